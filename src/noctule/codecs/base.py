"""The contract of a codec: a tensor becomes a payload of a known number of bytes, and a tensor again."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Payload:
    """An encoded tensor: byte-sized parts, and what decoding must know besides them."""

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    about: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes that go on the wire."""
        return sum(part.nbytes for part in self.parts)


@runtime_checkable
class Codec(Protocol):
    """Encodes and decodes; `unbiased` says that the mean of many decodings is the tensor itself."""

    unbiased: bool

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """The payload of ``x``; the same one for the same state of ``generator``."""
        ...

    def decode(self, payload: Payload) -> Tensor:
        """A tensor of the original shape and dtype."""
        ...
