"""The sparse product inside autograd: one function for eager mode, one registered operator for ``torch.compile``.

A Python ``autograd.Function`` costs about a third of a custom operator per call, and ``torch.compile`` can only look through
the second: each runs where it is the better one, on the same kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from noctule import kernels
from noctule.kernels import Epilogue, Kept
from noctule.topology import Topology, named

Watch = Callable[[Tensor, Any], None]
"""What is shown in a backward pass: the gradient before the epilogue and the input, as the layer's own methods take them."""


class SparseProduct(torch.autograd.Function):
    """y (B, O) = epilogue(x (B, I) Wᵀ + bias); what it returns is a transposed view of a feature-major (O, B)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor,
        values: Tensor,
        bias: Tensor | None,
        topology: Topology,
        epilogue: Epilogue,
        watch: Watch | None,
    ) -> Tensor:
        """Keep the feature-major input and two bits for each output at most."""
        x_IB = kernels.feature_major(x_BI)
        y_OB, kept = kernels.spmm(topology, values, x_IB, bias, epilogue, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(x_IB, values, kept.positive, kept.kept)
        ctx.topology, ctx.epilogue, ctx.watch, ctx.has_bias = topology, epilogue, watch, bias is not None
        return y_OB.t().data  # not as a view of something in here, which an in-place ReLU may not touch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BO: Tensor) -> tuple[Tensor | None, ...]:
        """The three gradients; whoever watches is shown what they are made of."""
        x_IB, values, positive, kept_bits = ctx.saved_tensors
        needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
        topology = ctx.topology
        dy_OB = kernels.feature_major(dy_BO)
        needs_bias = needs_bias and ctx.has_bias
        kept = Kept(ctx.epilogue, positive, kept_bits)
        dz_OB, dbias = kernels.epilogue_backward(dy_OB, kept, bias=needs_bias and not needs_values)
        dvalues = None
        if needs_values:
            dvalues, dbias = kernels.gradients(topology, dz_OB, x_IB, bias=needs_bias)
        dx_BI = kernels.spmm_t(topology, values, dz_OB).t() if needs_x else None
        if ctx.watch is not None:
            ctx.watch(dz_OB, x_IB)
        return dx_BI, dvalues, dbias, None, None, None


@torch.library.custom_op("noctule::sparse_linear", mutates_args=())
def compiled_product(
    x_BI: Tensor,
    values: Tensor,
    bias: Tensor | None,
    handle: Tensor,
    seed: Tensor,
    out_features: int,
    slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (O, B) and the bits that its backward needs; ``handle`` names the topology of the call, so it may change."""
    epilogue = Epilogue(slope, dropout, int(seed))
    y_OB, kept = kernels.spmm(named(handle), values, kernels.feature_major(x_BI), bias, epilogue, keep=True)
    nothing = torch.empty(0, dtype=torch.uint8, device=x_BI.device)
    return y_OB.contiguous(), _or(kept.positive, nothing), _or(kept.kept, nothing.clone())


@compiled_product.register_fake
def _(x_BI, values, bias, handle, seed, out_features, slope, dropout):
    batch = x_BI.shape[0]

    def bits(there: bool) -> Tensor:
        return x_BI.new_empty((out_features, (batch + 7) // 8) if there else (0,), dtype=torch.uint8)

    return x_BI.new_empty((out_features, batch), dtype=values.dtype), bits(slope != 1.0), bits(dropout > 0.0)


@torch.library.custom_op("noctule::sparse_linear_backward", mutates_args=())
def compiled_backward(
    dy_OB: Tensor,
    x_BI: Tensor,
    values: Tensor,
    handle: Tensor,
    positive: Tensor,
    kept: Tensor,
    slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (I, B), dvalues (N,), dbias (O,)."""
    topology: Topology = named(handle)
    state = Kept(Epilogue(slope, dropout), positive if slope != 1.0 else None, kept if dropout > 0.0 else None)
    dz_OB, _ = kernels.epilogue_backward(dy_OB, state, bias=False)
    dvalues, dbias = kernels.gradients(topology, dz_OB, kernels.feature_major(x_BI), bias=True)
    assert dbias is not None
    return kernels.spmm_t(topology, values, dz_OB).contiguous(), dvalues, dbias


@compiled_backward.register_fake
def _(dy_OB, x_BI, values, handle, positive, kept, slope, dropout):
    return x_BI.new_empty((x_BI.shape[1], x_BI.shape[0])), torch.empty_like(values), dy_OB.new_empty(dy_OB.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BI, values, bias, handle, _, _, ctx.slope, ctx.dropout = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x_BI, values, handle, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, dy_OB: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x_BI, values, handle, positive, kept = ctx.saved_tensors
    dx_IB, dvalues, dbias = compiled_backward(dy_OB, x_BI, values, handle, positive, kept, ctx.slope, ctx.dropout)
    return dx_IB.t(), dvalues, dbias if ctx.has_bias else None, None, None, None, None, None


compiled_product.register_autograd(_backward, setup_context=_keep)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x
