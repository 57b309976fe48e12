"""The contract of a codec: a tensor becomes a payload of a known number of bytes, and a tensor again."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Layout = tuple[tuple[torch.dtype, int | None], ...]
"""The dtype and the number of elements of each part; at most one number is None: what is left of the wire."""


@dataclass(frozen=True)
class Payload:
    """An encoded tensor: everything that decoding needs besides the codec itself.

    Parts are one-dimensional, contiguous and on the device of the tensor.
    """

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that go on the wire."""
        return sum(part.nbytes for part in self.parts)


@runtime_checkable
class Codec(Protocol):
    """Encodes and decodes. Lossy or not, inf and NaN do not vanish: what holds one decodes to one or more NaN or inf."""

    @property
    def unbiased(self) -> bool:
        """Whether the mean of many decodings is the tensor itself."""
        ...

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """The payload of ``x``; the same one for the same state of ``generator`` (of the CPU)."""
        ...

    def decode(self, payload: Payload) -> Tensor:
        """A tensor of the original shape and dtype."""
        ...

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The parts of the payload of any tensor of this shape and dtype."""
        ...


def pack(payload: Payload) -> Tensor:
    """The payload as one uint8 tensor of `Payload.nbytes`; shares the memory of a payload of one part.

    >>> from noctule.codecs import Cast
    >>> pack(Cast(torch.float16).encode(torch.tensor([1.0, 2.0]))).tolist()
    [0, 60, 0, 64]
    """
    parts = [part.view(torch.uint8) for part in payload.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(codec: Codec, wire: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Payload:
    """The payload that was packed; its parts share the memory of the wire where they can.

    Args:
        codec: the one that encoded.
        wire: uint8, from `pack`.
        shape: of the tensor that was encoded.
        dtype: of the tensor that was encoded.

    Raises:
        ValueError: the wire cannot be what this codec makes of such a tensor.
    """
    if wire.dtype is not torch.uint8 or wire.dim() != 1:
        raise ValueError(f"a wire is a one-dimensional uint8 tensor, got {wire.dtype} of shape {tuple(wire.shape)}")
    layout = codec.layout(tuple(shape), dtype)
    fixed = sum(kind.itemsize * count for kind, count in layout if count is not None)
    left = wire.numel() - fixed
    variable = [kind for kind, count in layout if count is None]
    if left < 0 or (left > 0 and not variable) or (variable and left % variable[0].itemsize):
        least = "at least " if variable else ""
        raise ValueError(
            f"{codec} encodes {dtype} of shape {tuple(shape)} in {least}{fixed} bytes, got {wire.numel()}: the wire is torn, "
            "or the sender has another codec, shape or dtype"
        )
    parts, at = [], 0
    for kind, count in layout:
        nbytes = left if count is None else kind.itemsize * count
        parts.append(_as(wire[at : at + nbytes], kind))
        at += nbytes
    return Payload(tuple(parts), tuple(shape), dtype)


def _as(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as elements; a copy where they are not aligned."""
    aligned = (
        part.is_contiguous() and part.storage_offset() % dtype.itemsize == 0 and part.data_ptr() % dtype.itemsize == 0
    )
    return (part if aligned else part.clone(memory_format=torch.contiguous_format)).view(dtype)
