"""Workers that are threads of one process: to simulate several on one machine, and for tests."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Arrived, Work
from noctule.exchange.messages import Format, coding


class Local:
    """One worker's path to the other threads; `Local.together` makes all of them."""

    def __init__(self, rank: int, world: int, room: "_Room") -> None:
        """Use `Local.together`."""
        self.rank, self.world, self._room = rank, world, room

    @classmethod
    def together(cls, world: int, *, timeout_seconds: float = 60.0) -> list["Local"]:
        """A path for each of so many threads.

        >>> [path.rank for path in Local.together(2)]
        [0, 1]
        """
        room = _Room(world, timeout_seconds)
        return [cls(rank, world, room) for rank in range(world)]

    def share(self, message: bytes) -> list[bytes]:
        """See `noctule.core.exchange.Path`."""
        wire = torch.frombuffer(bytearray(message + b"\0"), dtype=torch.uint8)[:-1]  # which takes no empty one
        wires = self._room.meet(self.rank, wire)
        return [bytes(wire.numpy()) for wire in wires]

    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Work:
        """See `noctule.core.exchange.Path`."""
        write, read, size = coding(tensors, codec)
        return Work(write + self.world * read, (self.world - 1) * size, self.world - 1)

    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        """Meet the other threads; every message is written and read as on a wire."""
        form = Format(tensors, codec, len(numbers))
        wire, delivered = form.write(tensors, numbers, generator)
        arrivals = [form.read(each, sender, keys) for sender, each in enumerate(self._room.meet(self.rank, wire))]
        sums = [sum(several, 0.0) for several in zip(*(found for _, found in arrivals), strict=True)]
        return Arrived(aggregate([found for found, _ in arrivals]), delivered, sums)


class _Room:
    def __init__(self, world: int, timeout_seconds: float) -> None:
        self.barrier = threading.Barrier(world, timeout=timeout_seconds)
        self.wires: list[Tensor] = [torch.empty(0)] * world
        self.timeout_seconds = timeout_seconds

    def meet(self, rank: int, wire: Tensor) -> list[Tensor]:
        self.wires[rank] = wire
        try:
            self.barrier.wait()
            found = list(self.wires)
            self.barrier.wait()  # before anybody writes the next
        except threading.BrokenBarrierError as error:
            raise ExchangeError(f"another worker did not come within {self.timeout_seconds:g} s, or failed") from error
        return found
