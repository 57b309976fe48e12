"""The plain mean of the workers' weights from time to time: local SGD."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from noctule.team.strategy import Coding, GroupMember, GroupStrategy

if TYPE_CHECKING:
    from noctule.core.exchange import Exchange
    from noctule.core.method import Method
    from noctule.exchange import Weigh


@dataclass(frozen=True, kw_only=True)
class LocalSGD(GroupStrategy):
    """The mean of the weights every so many steps: for slow links.

    Args:
        codec: none, bf16, natural (8 bits a number), topk (the largest 1.56 %, with error feedback), powersgd (rank 4), or auto
            (whatever is fastest on the link as measured).
        meet: steps from one meeting to the next.

    Raises:
        ValueError: there is no step between two meetings.
    """

    name: ClassVar[str] = "local"
    codec: Coding = "none"
    meet: int = 100

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.meet < 1:
            raise ValueError(f"workers meet after at least one step, got meet={self.meet}")

    @property
    @override
    def meet_every(self) -> int:
        return self.meet

    @override
    def exchange(self, weigh: "Weigh") -> "Exchange":
        from noctule.team import building

        return building.exchange(self.codec)

    @override
    def methods(self, exchange: "Exchange", member: GroupMember, *, rewire_every: int | None) -> "Sequence[Method]":
        from noctule.parallel.diloco import AVERAGE, DiLoCo

        return (DiLoCo(exchange, every=self.meet, outer=AVERAGE),)
