"""Tensors as they are."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from noctule.core.codec import Layout, Payload


@dataclass(frozen=True)
class Exact:
    """Every bit of a tensor, for what must not be rounded.

    >>> Exact().encode(torch.ones(100)).nbytes
    400
    """

    unbiased: bool = field(default=True, init=False, repr=False)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """``x`` itself."""
        return Payload((x.detach().contiguous().flatten(),), tuple(x.shape), x.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """It again."""
        return payload.parts[0].view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """All its numbers."""
        return ((dtype, torch.Size(shape).numel()),)
