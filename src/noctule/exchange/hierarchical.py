"""A path of two levels: a sum within each machine, and any other path between one worker of each.

It is a path and no exchange, so that residuals are kept in one place: the residual of a machine, which its leader's codec left, is
the leader's, and error feedback stays one subtraction.

Shapes: W workers on M machines.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate, mean
from noctule.core.exchange import Arrived, Cost, Path
from noctule.exchange.all_gather import AllGather
from noctule.exchange.group import Group, own_group
from noctule.exchange.message_format import bundled, unbundled


class Hierarchical(Path):
    """A path with exact sums within a machine; bytes between machines do not grow with the number of workers on each.

    A codec is used between the machines alone: the result is that of M workers which have the machines' means. Machines may have
    different numbers of workers. `Hierarchical.over_machines` makes one, and finds out which workers share a machine.

    Args:
        inside: all workers of this machine; the first of them is its leader.
        between: the path between the leaders, and None for all other workers.
        everyone: all workers of all machines.

    Raises:
        ValueError: a leader has no path to the others, or another worker has one.
    """

    def __init__(self, inside: Group, between: Path | None, everyone: Group) -> None:
        if (between is None) == (inside.rank == 0):
            raise ValueError(
                "the first worker of a machine has a path to other machines and no other worker has: worker "
                f"{inside.rank} of {inside.world} of its machine has {between}"
            )
        self.inside, self.between, self.group = inside, between, everyone
        self.rank, self.world = everyone.rank, everyone.world

    @classmethod
    def over_machines(
        cls, between: Callable[[dist.ProcessGroup], Path] = AllGather, *, machine: str | None = None
    ) -> "Hierarchical":
        """A path between all processes, in new process groups; every process must call it.

        Args:
            between: makes the path between the leaders, such as `TwoPhase`.
            machine: the name of the machine this process is on: see `machine_name`.
        """
        everyone = Group(own_group())
        places = machines(everyone, machine)
        leaders = own_group(places.leaders)
        inside = [own_group(members) for members in places.members][places.mine]
        path = between(leaders) if everyone.rank in places.leaders else None
        return cls(Group(inside), path, everyone)

    @override
    def share(self, message: bytes) -> list[bytes]:
        return self.group.share(message)

    @override
    def groups(self) -> tuple[object, ...]:
        between = () if self.between is None else self.between.groups()
        return (self.inside.group, self.group.group, *between)

    @override
    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Cost:
        """The cost between machines."""
        return Cost(0.0, 0.0, 0) if self.between is None else self.between.rehearse(tensors, codec)

    @override
    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        """Add up within the machine, exchange between leaders, broadcast within the machine.

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
        *sums, along = unbundled([self.inside.reduce(x) for x in bundled(likes)], likes)
        delivered, totals = list(tensors), sums
        if self.between is not None:
            share = self.between.world / self.world  # the mean of M such is the mean of all W
            ours = [x * share for x in sums]
            found = self.between(ours, keys, codec, aggregate, along.tolist(), generator)
            delivered = [
                x - (mine - entered).to(x.dtype) / share  # the residual of the machine is the leader's
                for x, mine, entered in zip(tensors, ours, found.delivered, strict=True)
            ]
            totals, along = found.totals, along.new_tensor(found.numbers)
        *totals, along = unbundled([self.inside.broadcast(x) for x in bundled([*totals, along])], likes)
        return Arrived(totals, delivered, along.tolist())


@dataclass(frozen=True)
class Machines:
    """The workers on each machine."""

    members: list[list[int]]
    """The ranks on each machine, in their order."""
    mine: int
    """The index of this worker's machine."""

    @property
    def leaders(self) -> list[int]:
        """The first worker of each machine."""
        return [ranks[0] for ranks in self.members]


def machines(everyone: Group, machine: str | None = None) -> Machines:
    """Find out which workers share a machine; all workers must call it."""
    mine = machine_name(everyone.rank) if machine is None else machine
    names = [name.decode() for name in everyone.share(mine.encode())]
    members = {name: [rank for rank, other in enumerate(names) if other == name] for name in names}
    return Machines(list(members.values()), list(members).index(mine))


def machine_name(rank: int) -> str:
    """The name of this machine: torchrun's, or one for every LOCAL_WORLD_SIZE ranks where that is set, or the host's."""
    if "GROUP_RANK" in os.environ:
        return os.environ["GROUP_RANK"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        return str(rank // int(os.environ["LOCAL_WORLD_SIZE"]))
    return socket.gethostname()
