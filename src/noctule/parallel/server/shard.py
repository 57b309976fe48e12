"""A shard of a parameter server: weights, the optimizer that updates them, and the state of each worker; without sockets.

The clock of a worker is the number of its pushes. With a bound s (stale synchronous parallel, Ho et al. 2013, NIPS) a worker at
clock c may continue if and only if the slowest one is at c - s or later; bound 0 is synchronous training, no bound is Downpour SGD
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
from noctule.parallel.server.moves import Move, TopologyLog
from noctule.parallel.server.weights import Weights
from noctule.parallel.server.worker_state import WorkerState

_REMEMBERED = 16
"""How many replaced sessions of a worker are remembered."""


class Shard:
    """Weights that workers push gradients to and pull from.

    Args:
        optimizer: makes the optimizer of a list of parameters; it updates each from its own gradient, as SGD, Adagrad and Adam do.
        workers: how many must have joined before any may run.
        patience_seconds: a worker without a message for so long no longer counts for the bound, until its next message.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        *,
        workers: int = 1,
        patience_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if workers < 1:
            raise ValueError(f"a server has at least one worker, got workers={workers}")
        self.make_optimizer, self.workers = optimizer, workers
        self.patience_seconds, self.now = patience_seconds, clock
        self.weights: Weights | None = None
        self.states: dict[int, WorkerState] = {}
        self.facts: dict[str, str] = {}
        """The model and options that every worker must have, as text by name."""
        self.bound: int | None = None
        self.warm_start = 0
        self.version = 0
        """How many pushes are in the weights."""
        self.staleness: Counter[int] = Counter()
        """How many pushes had each staleness."""
        self._held: dict[int, dict[str, Tensor]] = {}  # with bound 0: pushes of a clock that is not complete

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights by name; empty until worker 0 has sent its own."""
        return {} if self.weights is None else self.weights.parameters

    @property
    def logs(self) -> dict[str, TopologyLog]:
        """The topologies of the parameters that are a sparse layer's values."""
        return {} if self.weights is None else self.weights.logs

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
        """Set the initial weights, the topologies of sparse ones and the options; a second call does nothing."""
        if self.weights is None:
            self.weights = Weights(self.make_optimizer, weights, places or {})
            self.facts, self.bound, self.warm_start = dict(facts), bound, warm_start

    def join(self, worker: int, session: str, facts: Mapping[str, str]) -> bool:
        """Begin a session of a worker; False if it must wait for the initial weights or for the end of the warm start.

        Raises:
            ExchangeError: its model or codec is another one, or another session has replaced this one.
        """
        if not self.parameters:
            return False
        self._compare(worker, facts)
        state = self.states.get(worker)
        if state is not None and session in state.earlier:
            raise ExchangeError(
                f"worker {worker} has joined again from elsewhere, and this one is out: each worker needs a ticket of its own"
            )
        if state is not None and state.session == session:
            return self.note_message(worker, session)
        if worker != 0 and self._warming():
            return False
        clocks = [other.clock for number, other in self.states.items() if other.live and number != worker]
        start = min(clocks) if clocks else max((other.clock for other in self.states.values()), default=0)
        new = WorkerState(session, start, last_message=self.now())
        if state is not None:
            new.clock, new.applied = max(start, state.clock), state.applied
            new.earlier = [*state.earlier, state.session][-_REMEMBERED:]
        self.states[worker] = new
        return True

    def knows(self, worker: int, session: str) -> bool:
        """Whether this is the worker's present session."""
        return worker in self.states and self.states[worker].session == session

    def note_message(self, worker: int, session: str) -> bool:
        """Note that a worker is alive; returns whether its session is known."""
        if not self.knows(worker, session):
            return False
        state = self.states[worker]
        state.last_message = self.now()
        if not state.live:
            state.clock, state.live = max(state.clock, self._slowest(default=state.clock)), True
        return True

    def leave(self, worker: int) -> None:
        """Mark a worker as gone: other workers do not wait for it any more."""
        self.states[worker].live = False
        self._finish_rounds()

    def forget_silent(self) -> None:
        """Mark the workers without a message for `patience_seconds` as gone."""
        for state in self.states.values():
            if state.live and self.now() - state.last_message > self.patience_seconds:
                state.live = False
        self._finish_rounds()

    # Training.

    def may_run(self, worker: int) -> bool:
        """Whether the bound and the warm start let a worker continue."""
        clock = self.states[worker].clock
        if worker == 0 and self._warming():
            return True
        return len(self.states) >= self.workers and (
            self.bound is None or clock - self._slowest(default=clock) <= self.bound
        )

    def why_not(self, worker: int) -> str:
        """Say what a worker waits for."""
        if not self.parameters:
            return "worker 0 has not given the first weights"
        if worker not in self.states:
            return "worker 0 is still at the warm start"
        if len(self.states) < self.workers:
            return f"only {len(self.states)} of {self.workers} workers have joined"
        living = [number for number, state in self.states.items() if state.live]
        slowest = min(living, key=lambda number: self.states[number].clock, default=worker)
        behind = self.states[worker].clock - self.states[slowest].clock
        return f"worker {slowest} is {behind} pushes behind and the bound is {self.bound}"

    def push(
        self, worker: int, number: int, gradients: Mapping[str, Tensor], versions: Mapping[str, int] | None = None
    ) -> None:
        """Apply the next push of a worker that may run; with bound 0, when every worker has pushed.

        Args:
            versions: of the topologies that the gradients of sparse layers belong to (default: the present ones).

        Raises:
            ExchangeError: a gradient is not finite; nothing is applied.
        """
        for name, gradient in gradients.items():
            if not all_finite(gradient):
                raise ExchangeError(
                    f"push {number} of worker {worker} holds a gradient of {name!r} that is NaN or infinite; nothing of it is "
                    "applied. Lower the learning rate, clip, or look at the batch"
                )
        assert self.weights is not None
        remapped, state = self.weights.remapped(gradients, versions or {}), self.states[worker]
        state.seen, state.clock = number, state.clock + 1
        if self.bound == 0:
            self._held[worker] = remapped
            self._finish_rounds()
        else:
            self._apply({worker: remapped})

    def move(self, worker: int, number: int, moves: Mapping[str, tuple[Move, Tensor]]) -> None:
        """Move connections of some layers: weights, optimizer state and held gradients follow.

        Args:
            moves: for each layer the move and the initial values of its new connections.

        Raises:
            ExchangeError: a move does not fit the present connections; nothing is changed.
        """
        assert self.weights is not None
        for name, remap in self.weights.move(moves).items():
            for gradients in self._held.values():
                if name in gradients:
                    gradients[name] = remap.apply(gradients[name])
        self.states[worker].seen = number

    def pull(self, worker: int) -> dict[str, Tensor]:
        """The weights, which the worker has from now on."""
        state = self.states[worker]
        state.others = self.version - state.applied
        return {name: p.detach() for name, p in self.parameters.items()}

    # Snapshots.

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a snapshot to the disk; workers need not keep the pushes that are in it."""
        checkpoints.save(self.version, self.state_dict())
        for state in self.states.values():
            state.saved = state.seen

    def state_dict(self) -> dict[str, Any]:
        """All of the state, as plain data."""
        return {
            "facts": self.facts,
            "bound": self.bound,
            "warm_start": self.warm_start,
            "version": self.version,
            "staleness": dict(self.staleness),
            "states": {worker: asdict(state) for worker, state in self.states.items()},
            "weights": None if self.weights is None else self.weights.state_dict(),
            "held": self._held,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; each worker counts as alive.

        Raises:
            ExchangeError: it is of an earlier version of noctule.
        """
        if "states" not in state:
            raise ExchangeError("the server's folder was written by an earlier version of noctule: use a new one")
        kept = state["weights"]
        self.weights = None if kept is None else Weights.from_state_dict(self.make_optimizer, kept)
        self.facts, self.bound, self.warm_start = state["facts"], state["bound"], state["warm_start"]
        self.version, self.staleness = state["version"], Counter(state["staleness"])
        self.states = {
            worker: WorkerState(**{**each, "saved": each["seen"], "last_message": self.now()})
            for worker, each in state["states"].items()
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
        """Whether worker 0 is to push alone; not once another worker has joined, which may be waiting for it."""
        if not self.warm_start or self.states.keys() - {0}:
            return False
        first = self.states.get(0)
        return first is None or (first.live and first.clock < self.warm_start)

    def _slowest(self, *, default: int) -> int:
        return min((state.clock for state in self.states.values() if state.live), default=default)

    def _finish_rounds(self) -> None:
        """With bound 0: make one step with all pushes of a clock, once every live worker has pushed."""
        clock = max((self.states[worker].clock for worker in self._held), default=0)
        if self._held and self._slowest(default=clock) >= clock:
            held, self._held = self._held, {}
            self._apply(dict(sorted(held.items())))

    def _apply(self, pushes: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Make one step with the mean of the workers' gradients."""
        assert self.weights is not None
        self.weights.step(pushes.values())
        for worker in pushes:
            state = self.states[worker]
            state.staleness = max(0, self.version - state.applied - state.others)
            self.staleness[state.staleness] += 1
        for worker in pushes:
            self.states[worker].applied += 1
        self.version += len(pushes)
