"""One of several workers that train together in a process group, which is formed anew when a worker is lost or joins."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import Method
from noctule.data import Batches
from noctule.exchange import AllReduce, Group, LinkEstimate, NoiseScale, Weigh, probe_link
from noctule.sparse.rewire import Rewire
from noctule.team import building
from noctule.team.checkpoints import SharedCheckpoints
from noctule.team.elastic import Elastic
from noctule.team.journal import TeamJournal
from noctule.team.member import Team
from noctule.team.share import Share
from noctule.team.strategy import Strategy
from noctule.train.fit import Journal, Source

T = TypeVar("T")
_LOOK_SECONDS = 0.002
_CALLED = "the workers form a new group: one has joined or is lost, or all are to stop"


class Rendezvous(Protocol):
    """How a worker finds the others."""

    called: bool
    """Whether the others wait for a new group."""
    lost: bool
    """Whether one of the group is known to be gone, who would be waited for in vain."""
    stopped: bool
    """Whether the training is to stop, where all are at the same step."""

    def form(self) -> None:
        """Leave the group of `torch.distributed` there was, if any, and be in a new one with all who are there."""
        ...

    def again(self) -> bool:
        """Whether a group that has lost a worker can be formed anew."""
        ...


class Together(Team):
    """A worker among others.

    Synchronous workers are at the same step with the same weights, so the group goes on from whoever has come furthest: a worker
    that died while others finished their step, or that has just been started, takes over the state of such a one, bit for bit.

    Args:
        rendezvous: how it finds the others.
        member: which of the workers this is, for good.
        strategy: how they train together.
    """

    alone = one_machine = False

    def __init__(self, rendezvous: Rendezvous, *, member: int, strategy: Strategy) -> None:
        """In no group yet."""
        self.rendezvous, self.member, self.strategy = rendezvous, member, strategy
        self.rank, self.world, self.generation = member, 0, 0
        self.weigh = Weigh(1.0)
        # A group that is whole ends where no step is half done: before its gradients are exchanged, or see `before_batch`.
        self.exchange = Elastic(
            self, lambda: building.exchange(strategy, self.weigh), leave_for_new_group=strategy.equal_weights
        )
        self._sights = Elastic(self, lambda: Channel(path=AllReduce()), leave_for_new_group=False)
        self.broken = False
        self._link: LinkEstimate | None = None
        self._noise: NoiseScale | None = None
        self._batch = 0
        self._apart = False

    def form(self) -> None:
        """Leave the group there was, and be in the next one."""
        for elastic in (self.exchange, self._sights):
            elastic.forget()
        self.rendezvous.form()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.generation += 1
        self.broken = False
        # All or none measure the link: one who has just joined knows nothing of it, and would wait for the others.
        if self.world > 1 and b"" in Group().share(b"" if self._link is None else b"known"):
            self._link = probe_link(Group(), repeats=3, seconds=0.05, most_bytes=1 << 20)

    def check(self, *, leave_for_new_group: bool) -> None:
        """See `noctule.team.elastic.Grouped`."""
        if self.rendezvous.lost or (leave_for_new_group and self.rendezvous.called):
            raise LostWorkerError(_CALLED)

    def before_batch(self, step: int, *, first: bool) -> None:
        """See `Team`: workers that go apart between meetings vote right after one whether they form a new group.

        All are at the same step then, each has moved its connections, and no one's work since a meeting is at stake.
        """
        if not self.strategy.equal_weights and (first or step % self.strategy.meet_every == 0):
            (votes,) = self._sights([torch.tensor([float(self.rendezvous.called)])], ["a new group"])
            if votes > 0:
                self.broken = True
                raise LostWorkerError(_CALLED)

    def share(self, batches: Batches) -> Source:
        """See `Team`."""
        self._batch = batches.batch_size
        return Share(batches, self, self.weigh)

    def methods(self, *, steps: int) -> Sequence[Method]:
        """See `Team`."""
        if not self.strategy.exact_gradients:
            return (building.method(self.strategy, self.exchange),)
        self._noise = NoiseScale(self.exchange, samples=lambda: (self.weigh.n, self.weigh.mean * self.world))
        return (building.method(self.strategy, self._noise),)

    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        """See `Team`: where the workers' weights differ between two meetings, connections move right after one."""
        meet = self.strategy.meet_every
        return (Rewire(every=-(-every // meet) * meet, exchange=self._sights, **options),)

    def journal(self, journal: Journal, *, steps: int) -> Journal:
        """See `Team`."""
        return TeamJournal(journal, self, SharedCheckpoints(journal.checkpoints, self, steps=steps))

    def facts(self) -> dict[str, Any]:
        """See `Team`."""
        found: dict[str, Any] = {"groups": self.generation, "link": None if self._link is None else str(self._link)}
        if self._noise is not None and self._noise.measured:
            numbers = {name: getattr(self._noise, name) for name in ("signal", "noise", "measured")}
            found["noise_scale"] = {**numbers, "batch": self._batch}
        return found

    def train(self, training: Callable[[], T]) -> T:
        """See `Team`."""
        self.trained = True
        while True:
            try:
                if not self.generation or self.broken:
                    self.form()
                if not self._apart:
                    self._apart = (
                        True  # draws of its own, as for dropout: the workers' models are made by now, and alike
                    )
                    torch.manual_seed((torch.initial_seed() + self.member * 0x9E3779B9) % 2**64)
                return training()
            except LostWorkerError:
                if not self.rendezvous.again():
                    raise
                self.broken = True

    def obey(self) -> None:
        """Where the training is to stop: as if Ctrl-C had been pressed here, now that all are at the same step."""
        if self.rendezvous.stopped:
            signal.raise_signal(signal.SIGINT)


def join_group(
    store: Store, *, rank: int, world: int, name: str, timeout_seconds: float, called: Callable[[], bool]
) -> None:
    """A gloo group of who meets under this name, which waits for a silent peer for so long.

    Gloo would wait as long for one who has died on its way, so all say first that they are there; who is the first to know whether
    that is so says for all whether they go.

    Raises:
        RuntimeError: not all came, or this one was called elsewhere before they did.
    """
    store.set(f"{name}/here/{rank}", "")
    here, deadline = [f"{name}/here/{other}" for other in range(world)], time.monotonic() + timeout_seconds
    while not (complete := store.check(here)) and not called() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    if store.compare_set(f"{name}/goes", "", "yes" if complete else "no") == b"no":
        raise RuntimeError("a worker was lost on its way to the group")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=PrefixStore(name, store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_seconds),
    )
