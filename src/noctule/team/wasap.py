"""The team of a worker of WASAP-SGD: on a parameter server first, then alone, and merged with the others at the end."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from typing_extensions import override

from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import Method
from noctule.core.phases import Phases
from noctule.core.schedule import constant
from noctule.core.types import Schedule
from noctule.data import Batches
from noctule.exchange import AllGather, Local
from noctule.parallel.merging import Merge
from noctule.parallel.wasap import HandOver
from noctule.sparse.rewire import Rewire
from noctule.team.elastic import Elastic
from noctule.team.member import Team
from noctule.team.served import Pushing, ServedTeam
from noctule.team.strategy import Meeting
from noctule.train.fit import Journal, Loss, Source
from noctule.transport.ticket import Ticket

T = TypeVar("T")
SHARE = 0.7
"""The share of the steps that are on the parameter server, as in the paper."""


class WasapTeam(Team):
    """A worker of a parameter server that meets the others in a process group for the merge only.

    Args:
        meeting: how it finds the others.
        ticket: of the server.
        world: how many workers there are.
        strategy: how they train.
        timeout_seconds: for any one answer of the server.
    """

    alone = one_machine = many_models = False

    def __init__(
        self, meeting: Meeting, *, ticket: Ticket, world: int, strategy: Pushing, timeout_seconds: float
    ) -> None:
        self.meeting, self.strategy = meeting, strategy
        self.rank = self.member = ticket.worker
        self.world = world
        self.at_server = ServedTeam(ticket, world=world, strategy=strategy, timeout_seconds=timeout_seconds)
        self.generation, self.broken, self._in_group = 0, False, False
        self.exchange = Elastic(self, lambda: Channel(path=AllGather()))
        self._rewire: dict[str, Any] | None = None

    def check(self, *, leave_for_new_group: bool) -> None:
        """Form the group, before the first message to the others."""
        if not self._in_group:
            self.meeting.form()
            self.generation, self._in_group = self.generation + 1, True

    @override
    def share(self, batches: Batches, *, loss_fn: Loss | None = None) -> Source:
        return self.at_server.share(batches)

    @override
    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        self._rewire = {**options, "every": every}  # each phase has its own, among its methods
        return ()

    @override
    def methods(self, *, steps: int) -> Sequence[Method]:
        first = round(SHARE * steps)
        if not 0 < first < steps:
            raise ValueError(f"wasap needs steps in both phases, and this training has {steps}: give more epochs")
        options, self._rewire = self._rewire, None
        at_server, alone = list[Method](), list[Method]()
        if options is not None:
            seed, every = options.get("seed", 0), options["every"]
            if self.rank == 0:  # which moves the connections of all
                at_server.append(_rewire({**options, "every": self.strategy.rewire_every(every)}, begun=0))
            alone.append(_rewire({**options, "seed": seed + 1 + self.rank}, begun=first))
        pushing = self.at_server.pushing()
        phases = [HandOver(pushing, at=first), *at_server, pushing], [Merge(self.exchange, every=steps - first), *alone]
        return (Phases(*phases, until=[first]),)

    @override
    def journal(self, journal: Journal, *, steps: int) -> Journal:
        return self.at_server.journal(journal, steps=steps)

    @override
    def facts(self) -> dict[str, Any]:
        return self.at_server.facts()

    @override
    def train(self, training: Callable[[], T]) -> T:
        """Run the training; a worker lost during the merge has the others resume from their checkpoints and merge again."""
        self.trained = True
        while True:
            try:
                return training()
            except LostWorkerError:
                pass
            finally:
                self._leave()

    def _leave(self) -> None:
        if self._in_group:
            self.exchange.forget()
            if dist.is_initialized():
                dist.destroy_process_group()
            self.meeting.leave()
        self._in_group, self.broken = False, False


def _rewire(options: dict[str, Any], *, begun: int) -> Rewire:
    """What moves connections in a phase: its schedule resumes at step ``begun`` of the training, where the phase begins.

    A worker decides by what it sees itself.
    """
    fraction: float | Schedule = options.get("fraction", 0.3)
    schedule = constant(fraction) if isinstance(fraction, int | float) else fraction
    until = options.get("until")
    return Rewire(
        **{
            **options,
            "fraction": lambda step: schedule(step + begun),
            "until": None if until is None else max(0, until - begun),
            "exchange": Channel(path=Local.together(1)[0]),
        }
    )
