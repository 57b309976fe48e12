"""Half precision."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from noctule.core.codec import Layout, Payload


@dataclass(frozen=True)
class Cast:
    """Rounds to another floating dtype, to nearest: half the bytes of float32, and biased.

    What the smaller dtype cannot hold becomes inf, or zero where it is too small.

    >>> Cast(torch.bfloat16).encode(torch.ones(100)).nbytes
    200
    """

    dtype: torch.dtype = torch.bfloat16
    unbiased: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.dtype.is_floating_point:
            raise ValueError(f"Cast needs a floating dtype such as torch.bfloat16, got {self.dtype}")
        beyond = torch.tensor([math.inf, -math.inf, 0.0]).to(self.dtype).float()
        if bool(beyond[:2].isfinite().any()) or bool(beyond[2]):
            raise ValueError(
                f"{self.dtype} has no infinite number or no zero: use torch.float8_e5m2, or one of 16 bits"
            )

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """``x`` in the smaller dtype."""
        return Payload((x.detach().to(self.dtype).reshape(-1).contiguous(),), tuple(x.shape), x.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """Back in the original dtype."""
        return payload.parts[0].to(payload.dtype).view(payload.shape)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The numbers."""
        return ((self.dtype, math.prod(shape)),)
