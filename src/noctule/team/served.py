"""The team of a worker of a parameter server."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from typing_extensions import override

from noctule.core.method import Method
from noctule.data import Batches
from noctule.parallel.server.push_pull import PushPull
from noctule.sparse.rewire import Rewire
from noctule.team.building import codec
from noctule.team.journal import TeamJournal
from noctule.team.member import Team
from noctule.team.share import Share
from noctule.team.strategy import TensorCoding
from noctule.train.fit import Journal, Loss, Source
from noctule.transport.ticket import Ticket


class Pushing(Protocol):
    """How a worker pushes and pulls: a strategy with a parameter server."""

    @property
    def codec(self) -> TensorCoding:
        """What travels."""
        ...

    @property
    def meet_every(self) -> int:
        """Steps from one push and pull to the next."""
        ...

    @property
    def pushes_ahead(self) -> int | None:
        """How many pushes a worker may be ahead of the slowest one; None for any number."""
        ...

    def rewire_every(self, every: int) -> int:
        """Steps from one move of connections to the next, where ``every`` were asked for."""
        ...


class ServedTeam(Team):
    """A worker of a parameter server; restarted, it resumes from its own last checkpoint, with the server's weights.

    Worker 0 moves the connections of all.

    Args:
        ticket: of the server.
        world: how many workers there are.
        strategy: how they train.
        timeout_seconds: for any one answer of the server.
    """

    alone = one_machine = False
    many_models = False  # the server has one

    def __init__(self, ticket: Ticket, *, world: int, strategy: Pushing, timeout_seconds: float) -> None:
        self.rank, self.world = ticket.worker, world
        self.ticket, self.strategy, self.timeout_seconds = ticket, strategy, timeout_seconds
        self._shared: Share | None = None
        self._pushing: PushPull | None = None

    @override
    def share(self, batches: Batches, *, loss_fn: Loss | None = None) -> Source:
        self._shared = Share(batches, self)
        return self._shared

    @override
    def methods(self, *, steps: int) -> Sequence[Method]:
        return (self.pushing(),)

    def pushing(self) -> PushPull:
        """The method that pushes and pulls."""
        self._pushing = PushPull(
            self.ticket,
            push_every=self.strategy.meet_every,
            pull_every=self.strategy.meet_every,
            bound=self.strategy.pushes_ahead,
            codec=codec(self.strategy.codec),
            timeout_seconds=self.timeout_seconds,
            weigh=lambda: 1.0 if self._shared is None else self._shared.counts,
        )
        return self._pushing

    @override
    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        return (Rewire(every=self.strategy.rewire_every(every), **options),) if self.rank == 0 else ()

    @override
    def journal(self, journal: Journal, *, steps: int) -> Journal:
        return TeamJournal(journal, self, journal.checkpoints)

    @override
    def facts(self) -> dict[str, Any]:
        stale = Counter() if self._pushing is None else self._pushing.staleness
        return {"staleness": {str(by): count for by, count in sorted(stale.items())}}
