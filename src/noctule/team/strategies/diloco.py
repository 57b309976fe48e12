"""Weights from time to time, with an outer optimizer: see `noctule.parallel.diloco`."""

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
class Diloco(GroupStrategy):
    """How far the weights went, every so many steps, as a gradient for an outer Nesterov optimizer: for long stretches alone.

    Args:
        codec: none, bf16, natural (8 bits a number), topk (the largest 1.56 %, with error feedback), powersgd (rank 4), or auto
            (whatever is fastest on the link as measured).
        meet: steps from one meeting to the next.
        outer_rate: the learning rate of the outer optimizer.
        outer_momentum: its Nesterov momentum; smaller suits a training of a few hundred meetings or less.
        fragments: parts of the model that meet in turn, so that less is sent at once.
        overlap: steps that a worker trains on while an exchange is under way; 0 waits for it.
        blend: the share of its own weights that a worker keeps when it takes what has come after these steps.

    Raises:
        ValueError: an option is out of its range.
    """

    name: ClassVar[str] = "diloco"
    codec: Coding = "none"
    meet: int = 100
    outer_rate: float = 0.7
    outer_momentum: float = 0.9
    fragments: int = 1
    overlap: int = 0
    blend: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.meet < 1:
            raise ValueError(f"workers meet after at least one step, got meet={self.meet}")
        if not (self.outer_rate > 0.0 and 0.0 <= self.outer_momentum < 1.0):
            raise ValueError(
                f"outer_rate is above 0 and outer_momentum from 0 to less than 1, got {self.outer_rate} and {self.outer_momentum}"
            )
        if not (1 <= self.fragments <= self.meet and 0 <= self.overlap <= self.meet and 0.0 <= self.blend < 1.0):
            raise ValueError(
                f"fragments is from 1 to meet, overlap from 0 to meet and blend from 0 to less than 1, got {self.fragments}, "
                f"{self.overlap}, {self.blend} and meet={self.meet}"
            )

    @property
    @override
    def meet_every(self) -> int:
        return self.meet

    @override
    def exchange(self, weigh: "Weigh") -> "Exchange":
        from noctule.exchange import own_group
        from noctule.team import building

        return building.exchange(self.codec, group=own_group() if self.overlap else None)

    @override
    def methods(self, exchange: "Exchange", member: GroupMember, *, rewire_every: int | None) -> "Sequence[Method]":
        from functools import partial

        from torch.optim import SGD

        from noctule.parallel.diloco import DiLoCo
        from noctule.team.settle import SettleEvery

        momentum = self.outer_momentum
        outer = partial(SGD, lr=self.outer_rate, momentum=momentum, nesterov=momentum > 0.0)
        streaming = {"fragments": self.fragments, "overlap": self.overlap, "blend": self.blend}
        method = DiLoCo(exchange, every=self.meet, outer=outer, **streaming)
        if rewire_every is None or (self.fragments == 1 and not self.overlap):
            return (method,)
        return SettleEvery(method, every=rewire_every), method
