"""The team of a worker in a process group, which is formed anew when a worker is lost or joins."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from typing_extensions import override

from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel, Exchange
from noctule.core.method import Method
from noctule.core.random import generator
from noctule.data import Batches
from noctule.exchange import AllReduce, Group, LinkEstimate, NoiseScale, Weigh, probe_link
from noctule.sparse.rewire import Rewire
from noctule.team.checkpoints import SharedCheckpoints
from noctule.team.elastic import Elastic
from noctule.team.journal import TeamJournal
from noctule.team.member import Team
from noctule.team.share import Share
from noctule.team.strategy import GroupStrategy
from noctule.train.fit import Journal, Loss, Source

T = TypeVar("T")
_POLL_SECONDS = 0.002
_CALLED = "the workers form a new group: one has joined or is lost, or all are to stop"


class Rendezvous(Protocol):
    """How a worker finds the others and forms process groups with them."""

    called: bool
    """Whether a new group is wanted: a worker has joined or is lost, or all are to stop."""
    lost: bool
    """Whether a member of the group is known to be gone, so that an exchange would wait for it in vain."""
    stopped: bool
    """Whether the training is to stop, at a step that is the same for all."""

    def form(self) -> None:
        """Leave the group of `torch.distributed`, if there is one, and be in a new one with all workers that are there."""
        ...

    def again(self) -> bool:
        """Whether a group that has lost a worker can be formed anew."""
        ...


class GroupTeam(Team):
    """A worker in a process group.

    The group goes on from the worker that has come furthest. With synchronous workers a restarted worker, or one that was lost
    while the others finished a step, takes over that worker's state, bit for bit.

    Args:
        rendezvous: how it finds the others.
        member: the number of this worker, the same in all groups.
        strategy: how they train together.
    """

    alone = one_machine = False

    def __init__(self, rendezvous: Rendezvous, *, member: int, strategy: GroupStrategy) -> None:
        self.rendezvous, self.member, self.strategy = rendezvous, member, strategy
        self.rank, self.world, self.generation = member, 0, 0
        self.weigh = Weigh(1.0)
        # A whole group ends where no step is half done: before its gradients are exchanged, or see `before_batch`.
        self.exchange = Elastic(self, lambda: strategy.exchange(self.weigh), leave_for_new_group=strategy.equal_weights)
        self._means = Elastic(self, lambda: Channel(path=AllReduce()), leave_for_new_group=False)
        self.broken = False
        self._link: LinkEstimate | None = None
        self._noise: NoiseScale | None = None
        self._batch = 0
        self._rewire_every: int | None = None
        self._own_draws = False

    def form(self) -> None:
        """Leave the group and join the next one."""
        for elastic in (self.exchange, self._means):
            elastic.forget()
        self.rendezvous.form()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.generation += 1
        self.broken = False
        # All measure the link or none: a worker that has just joined does not know it, and would wait for the others.
        if self.world > 1 and b"" in Group().share(b"" if self._link is None else b"known"):
            self._link = probe_link(Group(), repeats=3, seconds=0.05, most_bytes=1 << 20)

    def check(self, *, leave_for_new_group: bool) -> None:
        """Raise LostWorkerError if a member is gone or, where that is heeded, if a new group is wanted."""
        if self.rendezvous.lost or (leave_for_new_group and self.rendezvous.called):
            raise LostWorkerError(_CALLED)

    @override
    def before_batch(self, step: int, *, first: bool) -> None:
        """Vote on a new group, where weights differ between two meetings: right after one, and where an epoch begins.

        All are at the same step then, connections have moved on each, and no work since a meeting would be lost.
        """
        if not self.strategy.equal_weights and (first or step % self.strategy.regroup_every == 0):
            (votes,) = self._means([torch.tensor([float(self.rendezvous.called)])], ["a new group"])
            if votes > 0:
                self.broken = True
                raise LostWorkerError(_CALLED)

    @override
    def share(self, batches: Batches, *, loss_fn: Loss | None = None) -> Source:
        self._batch = batches.batch_size
        return Share(batches, self, self.weigh)

    @override
    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        self._rewire_every = self.strategy.rewire_every(every)
        return (Rewire(every=self._rewire_every, exchange=self._means, **options),)

    @override
    def methods(self, *, steps: int) -> Sequence[Method]:
        exchange: Exchange = self.exchange
        if self.strategy.exact_gradients:
            exchange = self._noise = NoiseScale(exchange, samples=lambda: (self.weigh.n, self.weigh.mean * self.world))
        rewire_every, self._rewire_every = self._rewire_every, None
        return self.strategy.methods(exchange, self, rewire_every=rewire_every)

    @override
    def journal(self, journal: Journal, *, steps: int) -> Journal:
        return TeamJournal(journal, self, SharedCheckpoints(journal.checkpoints, self, steps=steps))

    @override
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"groups": self.generation, "link": None if self._link is None else str(self._link)}
        if self._noise is not None and self._noise.measured:
            numbers = {name: getattr(self._noise, name) for name in ("signal", "noise", "measured")}
            found["noise_scale"] = {**numbers, "batch": self._batch}
        return found

    @override
    def train(self, training: Callable[[], T]) -> T:
        self.trained = True
        while True:
            try:
                if not self.generation or self.broken:
                    self.form()
                if not self._own_draws:  # as for dropout: by now the workers' models are made, and alike
                    self._own_draws = True
                    torch.manual_seed(generator("worker", torch.initial_seed(), self.member).initial_seed())
                return training()
            except LostWorkerError:
                if not self.rendezvous.again():
                    raise
                self.broken = True

    def obey(self) -> None:
        """Stop if the training is to stop, as Ctrl-C does: all are at the same step now."""
        if self.rendezvous.stopped:
            signal.raise_signal(signal.SIGINT)


def join_group(
    store: Store, *, rank: int, world: int, name: str, timeout_seconds: float, called: Callable[[], bool]
) -> None:
    """Join the gloo group of this name.

    Gloo would wait for the whole timeout for a worker that has died on its way. So each writes to the store that it is there, and
    the first to see all of them, or to give up, decides for all whether the group is formed.

    Args:
        store: where the workers find each other.
        rank: of this worker in the group.
        world: how many workers the group has.
        name: of the group.
        timeout_seconds: for a silent peer.
        called: whether another group is wanted already.

    Raises:
        RuntimeError: not all came in time, or another group was wanted before they did.
    """
    store.set(f"{name}/here/{rank}", "")
    here, deadline = [f"{name}/here/{other}" for other in range(world)], time.monotonic() + timeout_seconds
    while not (complete := store.check(here)) and not called() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
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
