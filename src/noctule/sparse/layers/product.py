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
        needs = ctx.needs_input_grad
        y_BO, x_IB, kept = kernels.forward(topology, values, x_BI, bias, epilogue, keep=any(needs))
        ctx.rest = topology, epilogue, watch, bias is not None, x_IB is None
        if x_IB is None or not needs[0]:
            ctx.save_for_backward(x_BI if x_IB is None else x_IB, values, kept.positive, kept.kept)
            return y_BO
        ctx.save_for_backward(x_IB, values, kept.positive, kept.kept)
        ctx.set_materialize_grads(False)
        return y_BO, x_IB

    @staticmethod
    def backward(ctx: Any, dy_BO: Tensor | None, dx_IB: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The three gradients; ``watch`` is shown what they are made of."""
        x, values, positive, kept_bits = ctx.saved_tensors
        if dy_BO is None:
            return None if dx_IB is None else dx_IB.t(), None, None, None, None, None
        topology, epilogue, watch, has_bias, as_given = ctx.rest
        needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
        needs, kept = (needs_x, needs_values, needs_bias and has_bias), Kept(epilogue, positive, kept_bits)
        if first_order(dy_BO):
            dz_OB, dx_BI, dvalues, dbias = kernels.backward(
                topology, values, x, dy_BO, kept, needs, by_batch=not as_given
            )
        else:
            x_IB = x.t() if as_given else x
            dz_OB, dx_BI, dvalues, dbias = derivatives.gradients(dy_BO, x_IB, values, kept, topology, needs)
        if watch is not None and has_storage(dy_BO):
            dz_OB = kernels.feature_major(dy_BO) if dz_OB is None else dz_OB
            watch(dz_OB.detach(), (x.t() if as_given else x).detach())
        if dx_IB is not None:
            dx_BI = dx_IB.t() if dx_BI is None else dx_BI + dx_IB.t()
        return dx_BI, dvalues, dbias, None, None, None


def sparse_product(
    x_BI: Tensor, values: Tensor, bias: Tensor | None, topology: Topology, epilogue: Epilogue, watch: Watch | None
) -> Tensor:
    """y (B, O) of a `SparseProduct`."""
    y_BO: Any = SparseProduct.apply(x_BI, values, bias, topology, epilogue, watch)
    return y_BO if isinstance(y_BO, Tensor) else y_BO[0]
