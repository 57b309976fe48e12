"""`nn.Linear` on the faster matrix product that is in the same wheel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override


class OneDnnLinear(nn.Module):
    """`nn.Linear` with its three products done by oneDNN, which torch uses for float32 only where it compiles for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y_BO = _OneDnnProduct.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y_BO.view(*x.shape[:-1], -1)  # type: ignore[union-attr]


class _OneDnnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BI, weight_OI)
        ctx.has_bias = bias is not None
        return _product(x_BI, weight_OI, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, weight_OI = ctx.saved_tensors
        dx_BI = _product(dy_BO, weight_OI.t(), None) if ctx.needs_input_grad[0] else None
        return dx_BI, _product(dy_BO.t(), x_BI.t(), None), dy_BO.sum(0) if ctx.has_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
