"""Dense linear layers beside torch's own: the faster matrix product that is in the same wheel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class OneDnnLinear(nn.Module):
    """`nn.Linear` with its three products done by oneDNN, which torch uses for float32 only where it compiles for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the parameters."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, I) -> (B, O)."""
        return _OneDnnProduct.apply(x, self.weight, self.bias)  # type: ignore[return-value]


class _OneDnnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight_OI: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x_BI, weight_OI)
        return _product(x_BI, weight_OI, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, weight_OI = ctx.saved_tensors
        dx_BI = _product(dy_BO, weight_OI.t(), None) if ctx.needs_input_grad[0] else None
        return dx_BI, _product(dy_BO.t(), x_BI.t(), None), dy_BO.sum(0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
