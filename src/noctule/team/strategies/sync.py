"""Gradients at every step."""

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
class Sync(GroupStrategy):
    """Gradients at every step: the training is that of one worker on the whole batch.

    Args:
        codec: none, bf16, natural (8 bits a number), topk (the largest 1.56 %, with error feedback), powersgd (rank 4), or auto
            (whatever is fastest on the link as measured).
        per_machine: add up gradients in two levels: so many workers exactly, then one of them with the others' (0: all workers of
            a machine), so that a slow network between machines carries the codec's bytes once a machine.

    Raises:
        ValueError: an option cannot be, or auto is to choose between codecs on two levels.
    """

    name: ClassVar[str] = "sync"
    codec: Coding = "none"
    per_machine: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.per_machine is not None and (self.per_machine < 0 or self.codec == "auto"):
            raise ValueError(
                f"per_machine is at least 0 and needs a codec other than auto, which measures one level; got {self.per_machine} "
                f"and {self.codec}"
            )

    @property
    @override
    def equal_weights(self) -> bool:
        return True

    @property
    @override
    def exact_gradients(self) -> bool:
        return self.codec in ("none", "bf16")

    @override
    def exchange(self, weigh: "Weigh") -> "Exchange":
        from noctule.team import building

        return building.exchange(self.codec, weigh, per_machine=self.per_machine)

    @override
    def methods(self, exchange: "Exchange", member: GroupMember, *, rewire_every: int | None) -> "Sequence[Method]":
        from noctule.exchange import EverySync

        return (EverySync(exchange),)
