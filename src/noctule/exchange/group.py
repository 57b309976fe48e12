"""Collectives on a `torch.distributed` process group, with byte counts and errors that say which worker and what to do."""

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


_MOST_IN_FLIGHT, _BYTES_IN_FLIGHT = 3, 1 << 17
"""Messages that each worker has in flight: as many as hold so many bytes, at most three.

128 KiB fill a link of 100 Mbit/s and 10 ms, or of 1 Gbit/s and 1 ms. A single small message would leave the link idle for its
delay, and more would overflow queues that are too short."""


@dataclass
class Traffic:
    """What this process has exchanged with others so far."""

    sent_bytes: int = 0
    """Bytes sent, without what the transport adds; an all-reduce is counted as a ring does it."""
    seconds: float = 0.0
    """Seconds spent in communication: until the last worker has sent and the last byte has arrived."""


TRAFFIC = Traffic()
"""The traffic of this whole process: groups come and go while one training runs, and there are clients of servers beside them."""


def own_group(ranks: Sequence[int] | None = None) -> dist.ProcessGroup:
    """Make another process group, by default of all processes, for an exchange that runs while DDP communicates in the default one.

    Its timeout is that of the default group, where torch would make it half an hour. All processes must call it, members or not; a
    process that is no member gets a group that it cannot use.
    """
    group = dist.new_group(None if ranks is None else list(ranks), timeout=_default_timeout())
    return cast(dist.ProcessGroup, group)


class Group:
    """One worker's end of a process group.

    Args:
        group: of which this process is a member (default: the group of all processes).

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "there is no process group yet: call torch.distributed.init_process_group first, or start with torchrun"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        """The device on which messages must be."""
        self.sent_bytes = 0
        """Bytes sent in this group, counted as in `Traffic`."""

    def all_gather(self, wire: Tensor, *, fixed: bool) -> list[Tensor]:
        """Return the messages (uint8) of all workers, on the CPU; ``fixed`` says that all are of one length."""
        with self._communicating("all_gather"):
            sizes = [wire.numel()] * self.world if fixed else self._sizes(wire.numel())
            if self._is_direct:
                found = self._sent_directly([wire] * self.world, sizes)
                self.count((self.world - 1) * wire.numel())
                return found
            longest = max(sizes)
            padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
            padded[: wire.numel()] = wire
            gathered = torch.empty(self.world * longest, dtype=torch.uint8, device=self.device)
            _all_gather(gathered, padded, group=self.group)
        self.count((self.world - 1) * longest)
        return [each[:size] for each, size in zip(gathered.cpu().view(self.world, longest), sizes, strict=True)]

    def all_to_all(self, wires: Sequence[Tensor], *, sizes: Sequence[int] | None) -> list[Tensor]:
        """Send one message to each worker and return one from each, on the CPU.

        Args:
            wires: the message to each worker, by rank.
            sizes: the sizes of the messages to be received, where they are known.
        """
        sent = [wire.numel() for wire in wires]
        with self._communicating("all_to_all"):
            if sizes is None:
                counts = torch.tensor(sent, dtype=torch.int64, device=self.device)
                found_counts = torch.empty_like(counts)
                dist.all_to_all_single(found_counts, counts, group=self.group)
                sizes = found_counts.tolist()
            if self._is_direct:
                found = self._sent_directly(wires, sizes)
            else:
                together = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
                wire = torch.cat(list(wires)).to(self.device)
                dist.all_to_all_single(together, wire, list(sizes), sent, group=self.group)
                found = list(together.cpu().split(list(sizes)))
        self.count(sum(sent) - sent[self.rank])
        return found

    def all_to_all_each(self, wire_to: Callable[[int], Tensor], *, size: int | None) -> Iterator[tuple[int, Tensor]]:
        """An `all_to_all` with the other workers, message by message: each is made when it is to be sent, and yielded on arrival.

        The work on one message overlaps with the transfer of the next.

        Args:
            wire_to: makes the message to a worker.
            size: the size of every message, where it is known.

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

        if size is None or not self._is_direct:
            none = torch.empty(0, dtype=torch.uint8)
            wires = [none if peer == self.rank else made(peer) for peer in range(self.world)]
            sizes = None if size is None else [0 if peer == self.rank else size for peer in range(self.world)]
            yield from (each for each in enumerate(self.all_to_all(wires, sizes=sizes)) if each[0] != self.rank)
            return
        with self._communicating("all_to_all"):
            yield from self._trickled(made, [size] * self.world)
        self.count((self.world - 1) * size)

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Return the sum over all workers, in place of ``x`` where that is on the right device."""
        with self._communicating("all_reduce"):
            total = x.to(self.device)
            dist.all_reduce(total, group=self.group)
        self.count(round(2 * (self.world - 1) / self.world * x.nbytes))
        return total.to(x.device)

    def reduce(self, x: Tensor) -> Tensor:
        """Return the sum over all workers, at the first of them; the others get a tensor of no use."""
        with self._communicating("reduce"):
            total = x.to(self.device, copy=True)
            dist.reduce(total, group_dst=0, group=self.group)
        self.count(x.nbytes if self.rank else 0)
        return total.to(x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return the first worker's ``x`` at all workers; that of the others only says the shape."""
        with self._communicating("broadcast"):
            found = x.to(self.device)
            dist.broadcast(found, group_src=0, group=self.group)
        self.count(x.nbytes * (self.world - 1) if not self.rank else 0)
        return found.to(x.device)

    def swap(self, wire: Tensor, neighbours: Sequence[int], *, fixed: bool) -> list[Tensor]:
        """Send one message to each neighbour and return one from each, on the CPU; this worker must be a neighbour of theirs."""
        wire = wire.to(self.device)
        with self._communicating(f"isend and irecv with the workers {list(neighbours)}"):
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
        """The number of messages of this size that wait for one another in an `all_gather` or `all_to_all`."""
        return -(-(self.world - 1) // _in_flight(nbytes)) if self._is_direct else self.world - 1

    @property
    def _is_direct(self) -> bool:
        """Whether to send each message straight to its worker, instead of by gloo's collectives.

        These pass it round, which takes a delay for each worker on the way, or send everything at once, which overflows the queues
        before the receivers.
        """
        return self.world > 2 and self.device.type == "cpu"

    def _sent_directly(self, wires: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        found = [torch.empty(0, dtype=torch.uint8)] * self.world
        found[self.rank] = wires[self.rank].cpu().clone()
        for sender, wire in self._trickled(wires.__getitem__, sizes):
            found[sender] = wire
        return found

    def _trickled(self, wire_to: Callable[[int], Tensor], sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Send to the next rank, to the one after it, and so on, so that few workers at a time send to each; yield what arrives."""
        to, of = ([(self.rank + way * far) % self.world for far in range(1, self.world)] for way in (1, -1))
        found = [torch.empty(sizes[peer], dtype=torch.uint8) for peer in of]
        coming = [dist.irecv(x, group=self.group, group_src=peer) for x, peer in zip(found, of, strict=True)]
        going, ahead = [], _in_flight(max(sizes))
        for at in range(len(to) + ahead):
            if at < len(to):
                going.append(dist.isend(wire_to(to[at]).cpu(), group=self.group, group_dst=to[at]))
            if 0 <= (due := at + 1 - ahead) < len(of):
                _wait(coming[due])
                yield of[due], found[due]
        for work in going:
            _wait(work)

    def share(self, message: bytes) -> list[bytes]:
        """Return the messages of all workers, of any lengths, by rank."""
        wire = torch.frombuffer(bytearray(message + b"\0"), dtype=torch.uint8)[:-1]  # frombuffer takes no empty one
        return [bytes(each.numpy()) for each in self.all_gather(wire.to(self.device), fixed=False)]

    def _sizes(self, size: int) -> list[int]:
        sizes = torch.empty(self.world, dtype=torch.int64, device=self.device)
        _all_gather(sizes, torch.tensor([size], device=self.device), group=self.group)
        return sizes.tolist()

    def count(self, sent_bytes: int) -> None:
        """Count bytes that this worker has sent."""
        self.sent_bytes += sent_bytes
        TRAFFIC.sent_bytes += sent_bytes

    @contextmanager
    def _communicating(self, what: str) -> Iterator[None]:
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


def _in_flight(nbytes: float) -> int:
    return min(_MOST_IN_FLIGHT, max(1, math.ceil(_BYTES_IN_FLIGHT / max(nbytes, 1))))


def _wait(work: dist.Work | None) -> None:
    assert work is not None  # it is for processes outside the group
    work.wait()


def _default_timeout() -> timedelta | None:
    """The timeout of the group of all processes, which torch has no public function for."""
    world = dist.group.WORLD
    if world is None or dist.get_backend(world) != "gloo":
        return None
    return world._get_backend(torch.device("cpu")).options._timeout
