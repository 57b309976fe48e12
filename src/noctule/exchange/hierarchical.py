"""Two levels: workers of one machine add up what they have, one of them speaks with the other machines and hands on what they say.

A path and no exchange, so that there is one account of what is owed: the debt of a machine, which its leader's codec made, is the
leader's, and error feedback stays one subtraction.

Shapes: W workers on M machines.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate, mean
from noctule.core.exchange import Arrived, Path, Work
from noctule.exchange.all_gather import AllGather
from noctule.exchange.group import Group, own_group
from noctule.exchange.messages import bundled, unbundled


class Hierarchical:
    """Exact sums inside a machine, any path between machines; bytes between them do not grow with the workers of each.

    A codec is used between the machines alone: what comes is what M workers would get who had the machines' means. Machines may
    have different numbers of workers.

    Args:
        inside: all workers of this machine; the first of them is its leader.
        between: of the leaders, and None for all others.
        everyone: all workers of all machines, who share words.

    Raises:
        ValueError: a leader has no path to the others, or somebody else has one.
    """

    def __init__(self, inside: Group, between: Path | None, everyone: Group) -> None:
        """Use `Hierarchical.over_machines`, which finds out who is where."""
        if (between is None) == (inside.rank == 0):
            who = f"worker {inside.rank} of {inside.world} of its machine"
            raise ValueError(
                f"the first worker of a machine has a path to other machines and nobody else: {who} has {between}"
            )
        self.inside, self.between, self.group = inside, between, everyone
        self.rank, self.world = everyone.rank, everyone.world

    @classmethod
    def over_machines(
        cls, between: Callable[[dist.ProcessGroup], Path] = AllGather, *, machine: str | None = None
    ) -> "Hierarchical":
        """Over all processes, in groups of its own; every process must call it.

        Args:
            between: makes the path of the leaders, such as `TwoPhase`.
            machine: the name of the machine this process is on: see `machine_name`.
        """
        everyone = Group(own_group())
        places = machines(everyone, machine)
        leaders = own_group(places.leaders)
        inside = [own_group(members) for members in places.members][places.mine]
        path = between(leaders) if everyone.rank in places.leaders else None
        return cls(Group(inside), path, everyone)

    def share(self, message: bytes) -> list[bytes]:
        """See `noctule.core.exchange.Path`."""
        return self.group.share(message)

    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Work:
        """See `noctule.core.exchange.Path`; the bytes are those between machines."""
        return Work(0.0, 0.0, 0) if self.between is None else self.between.rehearse(tensors, codec)

    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        """See `noctule.core.exchange.Path`.

        Raises:
            ValueError: the aggregate is not the mean.
        """
        if aggregate is not mean:
            raise ValueError(
                f"machines add up what their workers have, which {getattr(aggregate, '__name__', aggregate)} cannot be had from: "
                "use AllGather"
            )
        along = torch.tensor(numbers, dtype=torch.float32, device=tensors[0].device if tensors else "cpu")
        likes = [*tensors, along]
        *sums, along = unbundled([self.inside.collect(x) for x in bundled(likes)], likes)
        delivered, totals = list(tensors), sums
        if self.between is not None:
            share = self.between.world / self.world  # the mean of M such is the mean of all W
            ours = [x * share for x in sums]
            found = self.between(ours, keys, codec, aggregate, along.tolist(), generator)
            delivered = [
                x
                - (mine - entered).to(x.dtype) / share  # what the codec left out of the machine's is the leader's debt
                for x, mine, entered in zip(tensors, ours, found.delivered, strict=True)
            ]
            totals, along = found.totals, along.new_tensor(found.numbers)
        *totals, along = unbundled([self.inside.hand_on(x) for x in bundled([*totals, along])], likes)
        return Arrived(totals, delivered, along.tolist())


@dataclass(frozen=True)
class Machines:
    """Which workers are where."""

    members: list[list[int]]
    """The ranks on each machine, in their order."""
    mine: int
    """Which of them is this worker's."""

    @property
    def leaders(self) -> list[int]:
        """The first of each machine."""
        return [ranks[0] for ranks in self.members]


def machines(everyone: Group, machine: str | None = None) -> Machines:
    """Who is on which machine; all workers must ask."""
    mine = machine_name(everyone.rank) if machine is None else machine
    names = [said.decode() for said in everyone.share(mine.encode())]
    members = {name: [rank for rank, other in enumerate(names) if other == name] for name in names}
    return Machines(list(members.values()), list(members).index(mine))


def machine_name(rank: int) -> str:
    """What torchrun calls this machine; or one of every LOCAL_WORLD_SIZE workers, where that is given; or the host's name."""
    if "GROUP_RANK" in os.environ:
        return os.environ["GROUP_RANK"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        return str(rank // int(os.environ["LOCAL_WORLD_SIZE"]))
    return socket.gethostname()
