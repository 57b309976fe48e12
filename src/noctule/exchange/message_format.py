"""The bytes of a message between workers: a few numbers, then each tensor as the codec encodes it."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from noctule.core.codec import Codec, pack, unpack
from noctule.core.errors import ExchangeError
from noctule.core.exact import Exact

_LENGTH = 8
"""The bytes of the length that goes before an encoded tensor of no fixed size."""


class MessageFormat:
    """The layout of messages with tensors of these shapes and dtypes, equal on all workers.

    Made anew for every exchange: it costs microseconds.
    """

    def __init__(self, tensors: Sequence[Tensor], codec: Codec | None, numbers: int) -> None:
        self.codec = Exact() if codec is None else codec
        self.likes = [(tuple(x.shape), x.dtype) for x in tensors]
        self.numbers = numbers
        self.fixed: list[int | None] = []
        for shape, dtype in self.likes:
            parts = self.codec.layout(shape, dtype)
            sizes = [None if count is None else count * part.itemsize for part, count in parts]
            self.fixed.append(None if None in sizes else sum(size for size in sizes if size is not None))

    @property
    def nbytes(self) -> int | None:
        """The size of every message; None where it depends on the numbers in the tensors."""
        if None in self.fixed:
            return None
        return 8 * self.numbers + sum(size for size in self.fixed if size is not None)

    def write(
        self, tensors: Sequence[Tensor], numbers: Sequence[float], generator: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        """The message (uint8), and the tensors that will be read from it."""
        parts, read = self.encode(tensors, generator)
        return self.message(numbers, parts), read

    def encode(self, tensors: Sequence[Tensor], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of the message after its numbers, and the tensors that will be read from it."""
        parts, read = [], []
        for x, size in zip(tensors, self.fixed, strict=True):
            payload = self.codec.encode(x, generator)
            if size is None:
                parts.append(torch.tensor([payload.nbytes], dtype=torch.int64, device="cpu").view(torch.uint8))
            parts.append(pack(payload).cpu())
            read.append(self.codec.decode(payload))
        return parts, read

    def message(self, numbers: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
        """The message made of the parts from `encode`."""
        return torch.cat([torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.uint8), *parts])

    def read(self, wire: Tensor, sender: int, keys: Sequence[str]) -> tuple[list[Tensor], list[float]]:
        """The tensors and the numbers.

        Raises:
            ExchangeError: the message is torn, longer than announced, or of other tensors.
        """
        at = 8 * self.numbers
        numbers = wire[:at].clone().view(torch.float64).tolist() if wire.numel() >= at else []
        tensors = []
        for (shape, dtype), size, key in zip(self.likes, self.fixed, keys, strict=True):
            if size is None:
                if wire.numel() < at + _LENGTH:
                    raise _torn(sender, key, wire.numel(), at + _LENGTH)
                size, at = int(wire[at : at + _LENGTH].clone().view(torch.int64)), at + _LENGTH
            if size < 0 or wire.numel() < at + size:
                raise _torn(sender, key, wire.numel(), at + size)
            try:
                tensors.append(self.codec.decode(unpack(self.codec, wire[at : at + size], shape, dtype)))
            except ValueError as error:
                raise ExchangeError(f"worker {sender} sent something else than the tensor {key!r}: {error}") from error
            at += size
        if wire.numel() != at:
            raise _torn(sender, "the end", wire.numel(), at)
        return tensors, numbers


def coding(tensors: Sequence[Tensor], codec: Codec | None) -> tuple[float, float, int]:
    """The seconds it takes to write and to read a message of such tensors, and its size in bytes."""
    form, generator = MessageFormat(tensors, codec, 0), torch.Generator().manual_seed(0)
    started = time.perf_counter()
    wire, _ = form.write(tensors, (), generator)
    written = time.perf_counter()
    form.read(wire, 0, [""] * len(tensors))
    return written - started, time.perf_counter() - written, wire.numel()


def bundled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One vector for all tensors of each dtype, so that a collective adds them up at once."""
    return [torch.cat([x.flatten() for x in tensors if x.dtype is dtype]) for dtype in _dtypes(tensors)]


def unbundled(vectors: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `bundled`, for tensors of these shapes and dtypes."""
    pieces = {
        dtype: iter(vector.split([x.numel() for x in likes if x.dtype is dtype]))
        for dtype, vector in zip(_dtypes(likes), vectors, strict=True)
    }
    return [next(pieces[x.dtype]).view(x.shape) for x in likes]


def _dtypes(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    return sorted({x.dtype for x in tensors}, key=str)


def _torn(sender: int, key: str, found: int, needed: int) -> ExchangeError:
    return ExchangeError(
        f"a message of worker {sender} has {found} bytes where {needed} are needed for {key!r}: it is torn, or its model or "
        "codec is another one"
    )
