"""The sparse product in eager mode: one function of autograd, on the fused kernels.

A Python ``autograd.Function`` costs about a third of a registered operator per call, which is what ``torch.compile`` needs
(`noctule.sparse.layers.operators`); derivatives of higher order and transforms go through `noctule.sparse.layers.derivatives`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import Epilogue, Kept
from noctule.sparse.layers import derivatives
from noctule.sparse.layers.surroundings import first_order, has_storage

Watch = Callable[[Tensor, Any], None]
"""What is shown in a backward pass: the gradient before the epilogue and the input, as the layer's own methods take them."""


class SparseProduct(torch.autograd.Function):
    """y (B, O) = epilogue(x (B, I) Wᵀ + bias); what it returns is a transposed view of a feature-major (O, B).

    Where the input had to be transposed and needs a gradient, the feature-major input is returned too: a second output, through
    which second derivatives find their way to ``x`` without another copy of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor,
        values: Tensor,
        bias: Tensor | None,
        topology: Topology,
        epilogue: Epilogue,
        watch: Watch | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Keep the feature-major input and two bits for each output at most."""
        needs_x, x_IB = ctx.needs_input_grad[0], kernels.feature_major(x_BI)
        y_OB, kept = kernels.spmm(topology, values, x_IB, bias, epilogue, keep=any(ctx.needs_input_grad))
        y_BO = y_OB.t().data  # not as a view of something in here, which an in-place ReLU may not touch
        ctx.topology, ctx.epilogue, ctx.watch, ctx.has_bias = topology, epilogue, watch, bias is not None
        ctx.as_given = needs_x and (x_BI.stride(0) == 1 or x_BI.shape[0] == 1)
        if ctx.as_given or not needs_x:
            ctx.save_for_backward(x_BI if ctx.as_given else x_IB, values, kept.positive, kept.kept)
            return y_BO
        x_IB = x_IB.data
        ctx.save_for_backward(x_IB, values, kept.positive, kept.kept)
        ctx.set_materialize_grads(False)
        return y_BO, x_IB

    @staticmethod
    def backward(ctx: Any, dy_BO: Tensor | None, dx_IB: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The three gradients; ``watch`` is shown what they are made of."""
        x, values, positive, kept_bits = ctx.saved_tensors
        if dy_BO is None:
            return None if dx_IB is None else dx_IB.t(), None, None, None, None, None
        needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
        needs_bias = needs_bias and ctx.has_bias
        topology, kept = ctx.topology, Kept(ctx.epilogue, positive, kept_bits)
        if first_order(dy_BO):
            x_IB = kernels.feature_major(x) if ctx.as_given else x
            dz_OB, dbias = kernels.epilogue_backward(
                kernels.feature_major(dy_BO), kept, bias=needs_bias and not needs_values
            )
            dvalues = None
            if needs_values:
                dvalues, dbias = kernels.gradients(topology, dz_OB, x_IB, bias=needs_bias)
            dx_BI = kernels.spmm_t(topology, values, dz_OB).t() if needs_x else None
        else:
            x_IB, needs = x.t() if ctx.as_given else x, (needs_x, needs_values, needs_bias)
            dz_OB, dx_BI, dvalues, dbias = derivatives.gradients(dy_BO, x_IB, values, kept, topology, needs)
        if ctx.watch is not None and has_storage(dz_OB):
            ctx.watch(dz_OB.detach(), x_IB.detach())
        if dx_IB is not None:
            dx_BI = dx_IB.t() if dx_BI is None else dx_BI + dx_IB.t()
        return dx_BI, dvalues, dbias, None, None, None


def sparse_product(
    x_BI: Tensor, values: Tensor, bias: Tensor | None, topology: Topology, epilogue: Epilogue, watch: Watch | None
) -> Tensor:
    """y (B, O) of a `SparseProduct`."""
    y_BO: Any = SparseProduct.apply(x_BI, values, bias, topology, epilogue, watch)
    return y_BO if isinstance(y_BO, Tensor) else y_BO[0]
