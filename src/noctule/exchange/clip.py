"""No worker's contribution is longer than it may be."""

import torch
from torch import Tensor

from noctule.core.exchange import Stage


class Clip(Stage):
    """Shortens each tensor to a Euclidean norm of at most ``norm``; its direction stays.

    Differs from ``clip_grad_norm_``, which takes all tensors together: every worker and every key is bounded by itself.
    """

    def __init__(self, norm: float) -> None:
        """Refuses a norm that is not positive."""
        if not norm > 0.0:
            raise ValueError(f"a norm to clip to must be above 0, got {norm}")
        self.norm = norm

    def send(self, x: Tensor, key: str) -> Tensor:
        """``x``, or a shorter one in its direction."""
        length = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
        if length.isinf():  # where x is finite, its square is beyond float32
            length = torch.linalg.vector_norm(x, dtype=torch.float64)
        return x * (self.norm / length.clamp(min=self.norm)).to(x.dtype)

    def __repr__(self) -> str:
        """The norm."""
        return f"Clip({self.norm:g})"
