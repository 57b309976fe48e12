"""Weights with a few neighbours at a time: see `noctule.parallel.gossip`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from noctule.team.strategy import GroupMember, GroupStrategy

if TYPE_CHECKING:
    from noctule.core.exchange import Exchange
    from noctule.core.method import Method
    from noctule.exchange import Weigh

_REGROUP_STEPS = 100
"""About how many steps a worker that joins waits: a group may end only where all workers speak with all."""


@dataclass(frozen=True, kw_only=True)
class Gossip(GroupStrategy):
    """Weights with a few neighbours at a time, and with all at the end of each epoch: for many workers.

    Args:
        graph: the neighbours of each worker: the two on a ring, the four on a torus, a ring drawn anew each time, or all.
        meet: steps from one meeting to the next.

    Raises:
        ValueError: there is no step between two meetings.
    """

    name: ClassVar[str] = "gossip"
    graph: Literal["ring", "torus", "random", "complete"] = "ring"
    meet: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.meet < 1:
            raise ValueError(f"workers meet after at least one step, got meet={self.meet}")

    @property
    @override
    def meet_every(self) -> int:
        return self.meet

    @property
    @override
    def regroup_every(self) -> int:
        return -(-_REGROUP_STEPS // self.meet) * self.meet

    @property
    @override
    def timeout_seconds(self) -> float:
        return min(29.0 + self.regroup_every, 300.0)

    @override
    def exchange(self, weigh: "Weigh") -> "Exchange":
        from noctule.team import building

        return building.exchange("none")

    @override
    def methods(self, exchange: "Exchange", member: GroupMember, *, rewire_every: int | None) -> "Sequence[Method]":
        from noctule.parallel import gossip, graphs
        from noctule.team.regrouped import Regrouped
        from noctule.team.settle import SettleEvery

        graph = getattr(graphs, self.graph)
        method = Regrouped(member, lambda: gossip.Gossip(graph, every=self.meet))
        return (method,) if rewire_every is None else (SettleEvery(method, every=rewire_every), method)
