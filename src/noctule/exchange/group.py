"""Bytes between the processes of a `torch.distributed` group, with errors that say which worker and what to do."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.core.errors import ExchangeError, LostWorkerError

_all_gather = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)  # the older name, which newer torch warns of


_AT_A_TIME, _UNDER_WAY = 3, 1 << 17
"""Messages under way from each worker, but no more than it takes for so many bytes, which fill lines of 100 Mbit/s and 10 ms, or 1
Gbit/s and 1 ms: a single small one would leave the line idle for its delay, more meet in queues that are too short."""


@dataclass
class Traffic:
    """What this process has had to do with others."""

    sent_bytes: int = 0
    """Of all messages so far, without what the transport adds; an all-reduce counted as a ring does it."""
    seconds: float = 0.0
    """In which messages were under way: until the last worker has sent and the last byte has come."""


TRAFFIC = Traffic()
"""Of all groups together."""


def own_group(ranks: Sequence[int] | None = None) -> dist.ProcessGroup:
    """Another process group, by default of all processes: for an exchange that runs while DDP speaks on the usual one.

    It waits for a silent peer as long as the usual one does, where torch would have it wait for half an hour. All processes must
    ask for it, those that are not in it too; they get one that they cannot use.
    """
    group = dist.new_group(None if ranks is None else list(ranks), timeout=_patience())
    return cast(dist.ProcessGroup, group)


class Group:
    """One worker's end of a process group.

    Args:
        group: of which this process is a member (default: the group of all processes).

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Nothing is sent yet."""
        if not dist.is_initialized():
            raise RuntimeError(
                "there is no process group yet: call torch.distributed.init_process_group first, or start with torchrun"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        """Where its messages must lie."""
        self.sent_bytes = 0
        """Of all its messages so far, as in `Traffic`."""

    def gather(self, wire: Tensor, *, fixed: bool) -> list[Tensor]:
        """The message (uint8) of every worker, on the CPU; ``fixed`` says that all are of one length."""
        with self._speaking("all_gather"):
            sizes = [wire.numel()] * self.world if fixed else self._sizes(wire.numel())
            if self._directly:
                found = self._dealt([wire] * self.world, sizes)
                self.count((self.world - 1) * wire.numel())
                return found
            longest = max(sizes)
            padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
            padded[: wire.numel()] = wire
            gathered = torch.empty(self.world * longest, dtype=torch.uint8, device=self.device)
            _all_gather(gathered, padded, group=self.group)
        self.count((self.world - 1) * longest)
        return [each[:size] for each, size in zip(gathered.cpu().view(self.world, longest), sizes, strict=True)]

    def trade(self, wires: Sequence[Tensor], *, sizes: Sequence[int] | None) -> list[Tensor]:
        """One message to each worker, and from each one, on the CPU; ``sizes`` of those that come, where they are known."""
        sent = [wire.numel() for wire in wires]
        with self._speaking("all_to_all"):
            if sizes is None:
                counts = torch.tensor(sent, dtype=torch.int64, device=self.device)
                found_counts = torch.empty_like(counts)
                dist.all_to_all_single(found_counts, counts, group=self.group)
                sizes = found_counts.tolist()
            if self._directly:
                found = self._dealt(wires, sizes)
            else:
                together = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
                wire = torch.cat(list(wires)).to(self.device)
                dist.all_to_all_single(together, wire, list(sizes), sent, group=self.group)
                found = list(together.cpu().split(list(sizes)))
        self.count(sum(sent) - sent[self.rank])
        return found

    def trade_each(self, wire_to: Callable[[int], Tensor], *, size: int | None) -> Iterator[tuple[int, Tensor]]:
        """A `trade` with all others, piece by piece: each message is made when it is to go, and is there as soon as it has come.

        What is done with one hides behind the sending of the next.

        Args:
            wire_to: makes the message to a worker.
            size: of every message, where it is known.

        Raises:
            ExchangeError: a message could not be made; LostWorkerError where a worker is gone.
        """

        def made(peer: int) -> Tensor:
            try:
                return wire_to(peer)
            except ExchangeError:
                raise
            except RuntimeError as error:
                raise ExchangeError(
                    f"worker {self.rank} could not make its message to worker {peer}: {error}"
                ) from error

        if size is None or not self._directly:
            none = torch.empty(0, dtype=torch.uint8)
            wires = [none if peer == self.rank else made(peer) for peer in range(self.world)]
            sizes = None if size is None else [0 if peer == self.rank else size for peer in range(self.world)]
            yield from (each for each in enumerate(self.trade(wires, sizes=sizes)) if each[0] != self.rank)
            return
        with self._speaking("all_to_all"):
            yield from self._in_turns(made, [size] * self.world)
        self.count((self.world - 1) * size)

    def add_(self, x: Tensor) -> Tensor:
        """The sum over all workers, in the place of ``x`` where that is on the right device."""
        with self._speaking("all_reduce"):
            total = x.to(self.device)
            dist.all_reduce(total, group=self.group)
        self.count(round(2 * (self.world - 1) / self.world * x.nbytes))
        return total.to(x.device)

    def collect(self, x: Tensor) -> Tensor:
        """The sum over all workers at the first of them; of no use to the others."""
        with self._speaking("reduce"):
            total = x.to(self.device, copy=True)
            dist.reduce(total, group_dst=0, group=self.group)
        self.count(x.nbytes if self.rank else 0)
        return total.to(x.device)

    def hand_on(self, x: Tensor) -> Tensor:
        """What the first worker has, at all; of the others, ``x`` says the shape."""
        with self._speaking("broadcast"):
            found = x.to(self.device)
            dist.broadcast(found, group_src=0, group=self.group)
        self.count(x.nbytes * (self.world - 1) if not self.rank else 0)
        return found.to(x.device)

    def swap(self, wire: Tensor, neighbours: Sequence[int], *, fixed: bool) -> list[Tensor]:
        """One message to all of some workers, and one from each, on the CPU; they must name this worker too."""
        wire = wire.to(self.device)
        with self._speaking(f"isend and irecv with the workers {list(neighbours)}"):
            sizes = [wire.numel()] * len(neighbours)
            if not fixed:
                mine = torch.tensor([wire.numel()], dtype=torch.int64, device=self.device)
                sizes = [int(size) for size in self._swapped(mine, neighbours, [1] * len(neighbours))]
            found = self._swapped(wire, neighbours, sizes)
        self.count(wire.numel() * len(neighbours))
        return [each.cpu() for each in found]

    def _swapped(self, mine: Tensor, neighbours: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
        found = [torch.empty(size, dtype=mine.dtype, device=self.device) for size in sizes]
        works = [dist.irecv(x, group=self.group, group_src=peer) for x, peer in zip(found, neighbours, strict=True)]
        works += [dist.isend(mine, group=self.group, group_dst=peer) for peer in neighbours]
        for work in works:
            _wait(work)
        return found

    def rounds(self, nbytes: float) -> int:
        """How many messages of this size wait for one another in a `gather` or a `trade`."""
        return -(-(self.world - 1) // _at_a_time(nbytes)) if self._directly else self.world - 1

    @property
    def _directly(self) -> bool:
        """Whether to send each message straight to its worker.

        Gloo's collectives hand it round, which takes a delay for each worker on the way, or have everybody send everything at once,
        which overflows the queues before the receivers.
        """
        return self.world > 2 and self.device.type == "cpu"

    def _dealt(self, wires: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        found = [torch.empty(0, dtype=torch.uint8)] * self.world
        found[self.rank] = wires[self.rank].cpu().clone()
        for sender, wire in self._in_turns(wires.__getitem__, sizes):
            found[sender] = wire
        return found

    def _in_turns(self, wire_to: Callable[[int], Tensor], sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Send to the next worker, to the one after it, and so on, so that few at a time send to each; yield what comes."""
        to, of = ([(self.rank + way * far) % self.world for far in range(1, self.world)] for way in (1, -1))
        found = [torch.empty(sizes[peer], dtype=torch.uint8) for peer in of]
        coming = [dist.irecv(x, group=self.group, group_src=peer) for x, peer in zip(found, of, strict=True)]
        going, ahead = [], _at_a_time(max(sizes))
        for at in range(len(to) + ahead):
            if at < len(to):
                going.append(dist.isend(wire_to(to[at]).cpu(), group=self.group, group_dst=to[at]))
            if 0 <= (due := at + 1 - ahead) < len(of):
                _wait(coming[due])
                yield of[due], found[due]
        for work in going:
            _wait(work)

    def share(self, message: bytes) -> list[bytes]:
        """The messages of all workers, of any lengths, in their order."""
        wire = torch.frombuffer(bytearray(message + b"\0"), dtype=torch.uint8)[:-1]  # which takes no empty one
        return [bytes(each.numpy()) for each in self.gather(wire.to(self.device), fixed=False)]

    def _sizes(self, size: int) -> list[int]:
        sizes = torch.empty(self.world, dtype=torch.int64, device=self.device)
        _all_gather(sizes, torch.tensor([size], device=self.device), group=self.group)
        return sizes.tolist()

    def count(self, sent_bytes: int) -> None:
        """Somebody has sent so many bytes."""
        self.sent_bytes += sent_bytes
        TRAFFIC.sent_bytes += sent_bytes

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except ExchangeError:
            raise
        except RuntimeError as error:
            raise LostWorkerError(
                f"worker {self.rank} of {self.world} could not finish {what}: {error}. A worker has died or left, the link is down "
                "for longer than the group's timeout, or the workers called different things"
            ) from error
        finally:
            TRAFFIC.seconds += time.perf_counter() - started


def _at_a_time(nbytes: float) -> int:
    return min(_AT_A_TIME, max(1, math.ceil(_UNDER_WAY / max(nbytes, 1))))


def _wait(work: dist.Work | None) -> None:
    assert work is not None  # it is for processes outside the group
    work.wait()


def _patience() -> timedelta | None:
    """How long the group of all processes waits; torch has no public way to ask."""
    world = dist.group.WORLD
    if world is None or dist.get_backend(world) != "gloo":
        return None
    return world._get_backend(torch.device("cpu")).options._timeout
