"""A path between threads of one process, to simulate several workers on one machine, and for tests."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Arrived, Cost, Path
from noctule.exchange.message_format import MessageFormat, coding


class Local(Path):
    """A path to the other threads; `Local.together` makes those of all workers."""

    def __init__(self, rank: int, world: int, meeting: "_Meeting") -> None:
        self.rank, self.world, self._meeting = rank, world, meeting

    @classmethod
    def together(cls, world: int, *, timeout_seconds: float = 60.0) -> list["Local"]:
        """A path for each of so many threads.

        >>> [path.rank for path in Local.together(2)]
        [0, 1]
        """
        meeting = _Meeting(world, timeout_seconds)
        return [cls(rank, world, meeting) for rank in range(world)]

    @override
    def share(self, message: bytes) -> list[bytes]:
        wire = torch.frombuffer(bytearray(message + b"\0"), dtype=torch.uint8)[:-1]  # frombuffer takes no empty one
        wires = self._meeting.meet(self.rank, wire)
        return [bytes(wire.numpy()) for wire in wires]

    @override
    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Cost:
        write, read, size = coding(tensors, codec)
        return Cost(write + self.world * read, (self.world - 1) * size, self.world - 1)

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
        form = MessageFormat(tensors, codec, len(numbers))
        wire, delivered = form.write(tensors, numbers, generator)
        arrivals = [form.read(each, sender, keys) for sender, each in enumerate(self._meeting.meet(self.rank, wire))]
        sums = [sum(several, 0.0) for several in zip(*(found for _, found in arrivals), strict=True)]
        return Arrived(aggregate([found for found, _ in arrivals]), delivered, sums)


class _Meeting:
    """Where the threads pass their messages to one another."""

    def __init__(self, world: int, timeout_seconds: float) -> None:
        self.barrier = threading.Barrier(world, timeout=timeout_seconds)
        self.wires: list[Tensor] = [torch.empty(0)] * world
        self.timeout_seconds = timeout_seconds

    def meet(self, rank: int, wire: Tensor) -> list[Tensor]:
        self.wires[rank] = wire
        try:
            self.barrier.wait()
            found = list(self.wires)
            self.barrier.wait()  # before any thread writes the next
        except threading.BrokenBarrierError as error:
            raise ExchangeError(f"another worker did not come within {self.timeout_seconds:g} s, or failed") from error
        return found
