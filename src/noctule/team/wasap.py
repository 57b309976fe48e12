"""One of several workers that train on a parameter server first, then apart, and are merged in the end: WASAP-SGD."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel, Exchange
from noctule.core.method import Method
from noctule.core.phases import Phases
from noctule.core.schedule import constant
from noctule.core.types import Schedule
from noctule.exchange import AllGather
from noctule.parallel.merging import Merge
from noctule.parallel.wasap import HandOver, wasap
from noctule.sparse.rewire import Rewire
from noctule.team.elastic import Elastic
from noctule.team.served import Apart

T = TypeVar("T")
SHARE = 0.7
"""Of the steps that are on the parameter server, as in the paper."""


class Meeting(Protocol):
    """How workers find one another for the merge."""

    def form(self) -> None:
        """Be in a process group with all the others, once they have come."""
        ...

    def leave(self) -> None:
        """Be in none."""
        ...


class Merging(Apart):
    """Meets the others in a process group for the merge only.

    Args:
        meeting: how it finds them.
        options: of `Apart`.
    """

    def __init__(self, meeting: Meeting, **options: Any) -> None:
        """Nothing is sent yet."""
        super().__init__(**options)
        self.meeting, self.member = meeting, self.rank
        self.generation, self.broken, self._together = 0, False, False
        self.exchange = Elastic(self, lambda: Channel(path=AllGather()))
        self._moving: dict[str, Any] | None = None

    def check(self, *, leave_for_new_group: bool) -> None:
        """Meet, at the first word to the others."""
        if not self._together:
            self.meeting.form()
            self.generation, self._together = self.generation + 1, True

    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        """See `Team`: all of it lies in the phases."""
        self._moving = {**options, "every": every}
        return ()

    def methods(self, *, steps: int) -> Sequence[Method]:
        """See `Team`."""
        pushing, first = self.pushing(), round(SHARE * steps)
        moving, self._moving = self._moving, None
        if not 0 < first < steps:
            raise ValueError(f"wasap needs steps in both phases, and this training has {steps}: give more epochs")
        if moving is None:
            alone = [Merge(self.exchange, every=steps - first)]
            return (Phases([HandOver(pushing, at=first), pushing], alone, until=[first]),)
        make = _moves(moving, first, at_server_every=self.strategy.meet_every)
        return (wasap(pushing, self.exchange, steps=steps, rewire=make, share=SHARE, seed=moving.get("seed", 0)),)

    def train(self, training: Callable[[], T]) -> T:
        """See `Team`: a worker that is lost during the merge has the others come to it once more, from their checkpoints."""
        self.trained = True
        while True:
            try:
                return training()
            except LostWorkerError:
                pass
            finally:
                self._leave()

    def _leave(self) -> None:
        if self._together:
            self.exchange.forget()
            if dist.is_initialized():
                dist.destroy_process_group()
            self.meeting.leave()
        self._together, self.broken = False, False


def _moves(options: dict[str, Any], first: int, *, at_server_every: int) -> Callable[..., Rewire]:
    """Makes a `Rewire` for either phase; what depends on the step goes on in the second where the first stopped."""
    base = options.get("seed", 0)

    def make(*, seed: int, exchange: Exchange) -> Rewire:
        shift = 0 if seed == base else first
        given, every = {**options, "seed": seed, "exchange": exchange}, options["every"]
        if not shift:
            given["every"] = -(-every // at_server_every) * at_server_every
        fraction: float | Schedule = given.get("fraction", 0.3)
        schedule = constant(fraction) if isinstance(fraction, int | float) else fraction
        given["fraction"] = lambda step: schedule(step + shift)
        if given.get("until") is not None:
            given["until"] = max(0, given["until"] - shift)
        return Rewire(**given)

    return make
