"""A stage that bounds the norm of each worker's contribution."""

import torch
from torch import Tensor
from typing_extensions import override

from noctule.core.exchange import Stage


class Clip(Stage):
    """A stage that shortens each tensor to a Euclidean norm of at most ``norm``; its direction stays.

    Differs from ``clip_grad_norm_``, which takes all tensors together: every worker and every key is bounded by itself.
    """

    def __init__(self, norm: float) -> None:
        if not norm > 0.0:
            raise ValueError(f"a norm to clip to must be above 0, got {norm}")
        self.norm = norm

    @override
    def send(self, x: Tensor, key: str) -> Tensor:
        length = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
        if length.isinf():  # where x is finite, its square is beyond float32
            length = torch.linalg.vector_norm(x, dtype=torch.float64)
        return x * (self.norm / length.clamp(min=self.norm)).to(x.dtype)

    @override
    def __repr__(self) -> str:
        return f"Clip({self.norm:g})"
