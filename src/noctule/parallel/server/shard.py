"""A shard of a parameter server: weights, the optimizer that moves them, and how far each worker is; without sockets.

The clock of a worker is the number of its pushes. With a bound s (stale synchronous parallel, Ho et al. 2013, NIPS) a worker at
clock c may go on if and only if the slowest one is at c - s or later; bound 0 is synchronous training, no bound is Downpour SGD
(Dean et al. 2012, "Large scale distributed deep networks", NIPS).
Differs from the papers: with bound 0 the pushes of one clock are applied as one, their mean, so that several workers are one worker
on all their batches, to the rounding.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.checkpoint import Checkpoints
from noctule.core.errors import ExchangeError
from noctule.core.finite import all_finite
from noctule.core.topology import Topology
from noctule.parallel.server.moves import Ledger, Move
from noctule.parallel.server.seat import Seat
from noctule.parallel.server.weights import Weights

_REMEMBERED = 16
"""Sessions of one worker that were replaced by later ones."""


class Shard:
    """Weights that workers push gradients to and pull from.

    Args:
        optimizer: makes the optimizer of a list of parameters, which moves each by its own gradient: SGD, Adagrad, Adam.
        workers: how many must have joined before any may go on.
        patience_seconds: a worker that said nothing for so long no longer counts for the bound; its next word brings it back.
        clock: the time in seconds.
    """

    def __init__(
        self,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        *,
        workers: int = 1,
        patience_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without weights, until the first worker gives them."""
        if workers < 1:
            raise ValueError(f"a server has at least one worker, got workers={workers}")
        self.make_optimizer, self.workers = optimizer, workers
        self.patience_seconds, self.now = patience_seconds, clock
        self.weights: Weights | None = None
        self.seats: dict[int, Seat] = {}
        self.facts: dict[str, str] = {}
        """What all workers must have alike."""
        self.bound: int | None = None
        self.warm_start = 0
        self.version = 0
        """How many pushes are in the weights."""
        self.staleness: Counter[int] = Counter()
        """How many pushes were how stale."""
        self._held: dict[int, dict[str, Tensor]] = {}  # with bound 0: the pushes of the clock that is not complete

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights; none until the first worker gives them."""
        return {} if self.weights is None else self.weights.parameters

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """The connections of those that are a sparse layer's values."""
        return {} if self.weights is None else self.weights.ledgers

    # Joining and leaving.

    def seed(
        self,
        weights: Mapping[str, Tensor],
        *,
        facts: Mapping[str, str],
        bound: int | None = None,
        warm_start: int = 0,
        places: Mapping[str, Topology] | None = None,
    ) -> None:
        """Take the first weights, the places of those that are sparse, and what is agreed on; later ones are ignored."""
        if self.weights is None:
            self.weights = Weights(self.make_optimizer, weights, places or {})
            self.facts, self.bound, self.warm_start = dict(facts), bound, warm_start

    def join(self, worker: int, session: str, facts: Mapping[str, str]) -> bool:
        """Give a worker its place; False where it must wait, for the first weights or for the end of the warm start.

        Raises:
            ExchangeError: its model or codec is another one, or it has joined anew since.
        """
        if not self.parameters:
            return False
        self._compare(worker, facts)
        seat = self.seats.get(worker)
        if seat is not None and session in seat.earlier:
            raise ExchangeError(
                f"worker {worker} has joined again from elsewhere, and this one is out: each worker needs a ticket of its own"
            )
        if seat is not None and seat.session == session:
            return self.hears(worker, session)
        if worker != 0 and self._warming():
            return False
        clocks = [other.clock for number, other in self.seats.items() if other.live and number != worker]
        start = min(clocks) if clocks else max((other.clock for other in self.seats.values()), default=0)
        new = Seat(session, start, heard=self.now())
        if seat is not None:
            new.clock, new.applied = max(start, seat.clock), seat.applied
            new.earlier = [*seat.earlier, seat.session][-_REMEMBERED:]
        self.seats[worker] = new
        return True

    def knows(self, worker: int, session: str) -> bool:
        """Whether this is the session of this worker."""
        return worker in self.seats and self.seats[worker].session == session

    def hears(self, worker: int, session: str) -> bool:
        """A word of a worker, which lives then; whether its session is known here."""
        if not self.knows(worker, session):
            return False
        seat = self.seats[worker]
        seat.heard = self.now()
        if not seat.live:
            seat.clock, seat.live = max(seat.clock, self._slowest(default=seat.clock)), True
        return True

    def leave(self, worker: int) -> None:
        """From now on it does not count for the bound."""
        self.seats[worker].live = False
        self._finish_rounds()

    def forget_silent(self) -> None:
        """Whoever said nothing for too long does not count."""
        for seat in self.seats.values():
            if seat.live and self.now() - seat.heard > self.patience_seconds:
                seat.live = False
        self._finish_rounds()

    # Training.

    def may_run(self, worker: int) -> bool:
        """Whether this worker may go on from where it is."""
        clock = self.seats[worker].clock
        if worker == 0 and self._warming():
            return True
        return len(self.seats) >= self.workers and (
            self.bound is None or clock - self._slowest(default=clock) <= self.bound
        )

    def why_not(self, worker: int) -> str:
        """For whom or what a worker waits."""
        if not self.parameters:
            return "worker 0 has not given the first weights"
        if worker not in self.seats:
            return "worker 0 is still at the warm start"
        if len(self.seats) < self.workers:
            return f"only {len(self.seats)} of {self.workers} workers have joined"
        living = [number for number, seat in self.seats.items() if seat.live]
        slowest = min(living, key=lambda number: self.seats[number].clock, default=worker)
        behind = self.seats[worker].clock - self.seats[slowest].clock
        return f"worker {slowest} is {behind} pushes behind and the bound is {self.bound}"

    def push(
        self, worker: int, number: int, gradients: Mapping[str, Tensor], versions: Mapping[str, int] | None = None
    ) -> None:
        """Take the next push of a worker that may run.

        Args:
            versions: of the connections that the gradients of sparse layers are of (default: those that there are now).

        Raises:
            ExchangeError: a gradient is not finite: nobody else's weights are to suffer, and nothing is applied.
        """
        for name, gradient in gradients.items():
            if not all_finite(gradient):
                raise ExchangeError(
                    f"push {number} of worker {worker} holds a gradient of {name!r} that is NaN or infinite; nothing of it is "
                    "applied. Lower the learning rate, clip, or look at the batch"
                )
        assert self.weights is not None
        laid, seat = self.weights.laid(gradients, versions or {}), self.seats[worker]
        seat.seen, seat.clock = number, seat.clock + 1
        if self.bound == 0:
            self._held[worker] = laid
            self._finish_rounds()
        else:
            self._apply({worker: laid})

    def move(self, worker: int, number: int, moves: Mapping[str, tuple[Move, Tensor]]) -> None:
        """Move connections of some layers, given the first values of those that come: weights, state and held gradients follow.

        Raises:
            ExchangeError: that is no move of the connections there are; nothing is changed.
        """
        assert self.weights is not None
        for name, remap in self.weights.move(moves).items():
            for gradients in self._held.values():
                if name in gradients:
                    gradients[name] = remap.apply(gradients[name])
        self.seats[worker].seen = number

    def pull(self, worker: int) -> dict[str, Tensor]:
        """The weights, which a worker goes on from."""
        seat = self.seats[worker]
        seat.others = self.version - seat.applied
        return {name: p.detach() for name, p in self.parameters.items()}

    # Snapshots.

    def save(self, checkpoints: Checkpoints) -> None:
        """Write all of it to the disk; pushes up to here need not be sent again."""
        checkpoints.save(self.version, self.state_dict())
        for seat in self.seats.values():
            seat.saved = seat.seen

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "facts": self.facts,
            "bound": self.bound,
            "warm_start": self.warm_start,
            "version": self.version,
            "staleness": dict(self.staleness),
            "seats": {worker: asdict(seat) for worker, seat in self.seats.items()},
            "weights": None if self.weights is None else self.weights.state_dict(),
            "held": self._held,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; nobody is taken for silent because of the time between."""
        kept = state["weights"]
        self.weights = None if kept is None else Weights.from_state_dict(self.make_optimizer, kept)
        self.facts, self.bound, self.warm_start = state["facts"], state["bound"], state["warm_start"]
        self.version, self.staleness = state["version"], Counter(state["staleness"])
        self.seats = {
            worker: Seat(**{**seat, "saved": seat["seen"], "heard": self.now()})
            for worker, seat in state["seats"].items()
        }
        self._held = dict(state["held"])

    # Inside.

    def _compare(self, worker: int, facts: Mapping[str, str]) -> None:
        for name in [*self.facts, *facts]:
            if self.facts.get(name) != facts.get(name):
                raise ExchangeError(
                    f"worker {worker} differs from the server in {name!r}: {facts.get(name, 'not there')}, where it has "
                    f"{self.facts.get(name, 'nothing of that name')}. Make the model in the same way on every worker and give "
                    "PushPull the same options, or begin in another folder"
                )

    def _warming(self) -> bool:
        """Whether worker 0 is still to push alone; never again once another is in, who may be waiting for it."""
        if not self.warm_start or self.seats.keys() - {0}:
            return False
        first = self.seats.get(0)
        return first is None or (first.live and first.clock < self.warm_start)

    def _slowest(self, *, default: int) -> int:
        return min((seat.clock for seat in self.seats.values() if seat.live), default=default)

    def _finish_rounds(self) -> None:
        """With bound 0: when every worker has pushed, all of it is one step."""
        clock = max((self.seats[worker].clock for worker in self._held), default=0)
        if self._held and self._slowest(default=clock) >= clock:
            held, self._held = self._held, {}
            self._apply(dict(sorted(held.items())))

    def _apply(self, pushes: Mapping[int, Mapping[str, Tensor]]) -> None:
        """One step with the mean of some workers' gradients."""
        assert self.weights is not None
        self.weights.step(pushes.values())
        for worker in pushes:
            seat = self.seats[worker]
            seat.staleness = max(0, self.version - seat.applied - seat.others)
            self.staleness[seat.staleness] += 1
        for worker in pushes:
            self.seats[worker].applied += 1
        self.version += len(pushes)
