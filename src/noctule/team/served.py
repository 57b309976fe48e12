"""One of several workers that meet at a parameter server only: nobody is waited for, but as far as a bound says."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from noctule.core.method import Method
from noctule.data import Batches
from noctule.parallel.server.push_pull import PushPull
from noctule.sparse.rewire import Rewire
from noctule.team.building import codec
from noctule.team.journal import TeamJournal
from noctule.team.member import Team
from noctule.team.share import Share
from noctule.team.strategy import Strategy
from noctule.train.fit import Journal, Source
from noctule.transport.ticket import Ticket


class Apart(Team):
    """A worker of a parameter server: when it is started again it goes on from its own last checkpoint, with the server's weights.

    Worker 0 moves connections for all.

    Args:
        ticket: of the server.
        world: how many workers there are.
        strategy: how they train.
        timeout_seconds: for any one answer of the server.
    """

    alone = one_machine = False
    many_models = False  # the server has one

    def __init__(self, ticket: Ticket, *, world: int, strategy: Strategy, timeout_seconds: float) -> None:
        """Nothing is sent yet."""
        self.rank, self.world = ticket.worker, world
        self.ticket, self.strategy, self.timeout_seconds = ticket, strategy, timeout_seconds
        self._shared: Share | None = None
        self._pushing: PushPull | None = None

    def share(self, batches: Batches) -> Source:
        """See `Team`."""
        self._shared = Share(batches, self)
        return self._shared

    def methods(self, *, steps: int) -> Sequence[Method]:
        """See `Team`."""
        return (self.pushing(),)

    def pushing(self) -> PushPull:
        """What keeps this worker and the server together."""
        self._pushing = PushPull(
            self.ticket,
            push_every=self.strategy.meet_every,
            pull_every=self.strategy.meet_every,
            bound=self.strategy.staleness_bound,
            codec=codec(self.strategy.codec),
            timeout_seconds=self.timeout_seconds,
            weigh=lambda: 1.0 if self._shared is None else self._shared.counts,
        )
        return self._pushing

    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        """See `Team`."""
        meet = self.strategy.meet_every
        return (Rewire(every=-(-every // meet) * meet, **options),) if self.rank == 0 else ()

    def journal(self, journal: Journal, *, steps: int) -> Journal:
        """See `Team`."""
        return TeamJournal(journal, self, journal.checkpoints)

    def facts(self) -> dict[str, Any]:
        """See `Team`."""
        stale = Counter() if self._pushing is None else self._pushing.staleness
        return {"staleness": {str(by): count for by, count in sorted(stale.items())}}
