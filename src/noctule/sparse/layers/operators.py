"""The sparse product as a registered operator, for ``torch.compile`` and ``torch.export``; eager mode uses `SparseProduct`.

A compiled graph takes a topology's handle as an input, so places may move between calls without compiling again. An exported
program lives in other processes too: it holds the places themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from noctule import kernels
from noctule.core.topology import Topology, named
from noctule.kernels import Epilogue, Kept


def places_now(topology: Topology) -> list[Tensor]:
    """What names the places in the graph that is being made: the handle, or row pointers and columns where it is exported."""
    return [topology.row_ptr, topology.columns] if torch.compiler.is_exporting() else [topology.handle]


def topology_of(places: Sequence[Tensor], shape: tuple[int, int]) -> Topology:
    """The inverse of `places_now`, for a weight of this shape (O, I)."""
    if len(places) == 1:
        return named(places[0])
    row_ptr, columns = places
    version = shape, row_ptr._version, columns._version
    known = _opened.get(columns)
    if known is None or known[0] != version:
        known = _opened[columns] = version, Topology(shape, row_ptr.detach(), columns.detach())
    return known[1]


_opened: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Columns that an exported program holds -> their topology, which knows its transpose from the second step on."""


@torch.library.custom_op("noctule::sparse_linear", mutates_args=())
def compiled_product(
    x_BI: Tensor,
    values: Tensor,
    bias: Tensor | None,
    places: Sequence[Tensor],
    seed: Tensor,
    out_features: int,
    slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (O, B) and the bits that its backward needs; ``places`` are those of `places_now`."""
    epilogue = Epilogue(slope, dropout, int(seed))
    topology = topology_of(places, (out_features, x_BI.shape[1]))
    y_OB, kept = kernels.spmm(topology, values, kernels.feature_major(x_BI), bias, epilogue, keep=True)
    return y_OB.contiguous(), *flat_bits(kept, x_BI)


@compiled_product.register_fake
def _(x_BI, values, bias, places, seed, out_features, slope, dropout):
    batch = x_BI.shape[0]

    def bits(there: bool) -> Tensor:
        return x_BI.new_empty(out_features * ((batch + 7) // 8) if there else 0, dtype=torch.uint8)

    return x_BI.new_empty((out_features, batch), dtype=values.dtype), bits(slope != 1.0), bits(dropout > 0.0)


@torch.library.custom_op("noctule::sparse_linear_backward", mutates_args=())
def compiled_backward(
    dy_OB: Tensor,
    x_BI: Tensor,
    values: Tensor,
    places: Sequence[Tensor],
    positive: Tensor,
    kept: Tensor,
    slope: float,
    dropout: float,
    needs_x: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (I, B), dvalues (N,), dbias (O,); empty what is not needed, the last two going together."""
    topology = topology_of(places, (dy_OB.shape[0], x_BI.shape[1]))
    rows, batch = dy_OB.shape
    state = kept_of(Epilogue(slope, dropout), positive, kept, (rows, (batch + 7) // 8))
    dz_OB, _ = kernels.epilogue_backward(dy_OB, state, bias=False)
    dx_IB = kernels.spmm_t(topology, values, dz_OB).contiguous() if needs_x else x_BI.new_empty(0)
    if not needs_values:
        return dx_IB, values.new_empty(0), dz_OB.sum(1)
    dvalues, dbias = kernels.gradients(topology, dz_OB, kernels.feature_major(x_BI), bias=True)
    assert dbias is not None
    return dx_IB, dvalues, dbias


@compiled_backward.register_fake
def _(dy_OB, x_BI, values, places, positive, kept, slope, dropout, needs_x, needs_values):
    dx_IB = x_BI.new_empty((x_BI.shape[1], x_BI.shape[0]) if needs_x else (0,))
    return dx_IB, values.new_empty(values.shape if needs_values else (0,)), dy_OB.new_empty(dy_OB.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BI, values, bias, places, _, _, ctx.slope, ctx.dropout = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x_BI, values, output[1], output[2], *places)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, dy_OB: Tensor, *_: Any) -> tuple[Any, ...]:
    x_BI, values, positive, kept = ctx.saved_tensors[:4]
    places = list(ctx.saved_tensors[4:])
    needs_x, needs_values = ctx.needs_input_grad[:2]
    dx_IB, dvalues, dbias = compiled_backward(
        dy_OB, x_BI, values, places, positive, kept, ctx.slope, ctx.dropout, needs_x, needs_values
    )
    return (
        dx_IB.t() if needs_x else None,
        dvalues if needs_values else None,
        dbias if ctx.has_bias else None,
        [None] * len(places),
        None,
        None,
        None,
        None,
    )


compiled_product.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.noctule.sparse_linear)
def _(x_shape: Any, values_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * values_shape[0] * x_shape[0]


@register_flop_formula(torch.ops.noctule.sparse_linear_backward)
def _(dy_shape: Any, x_shape: Any, values_shape: Any, *rest: Any, **_: Any) -> int:
    return 2 * values_shape[0] * x_shape[0] * sum(rest[-2:])


def flat_bits(kept: Kept, like: Tensor) -> tuple[Tensor, Tensor]:
    """What an operator returns of an epilogue's bits: flat, since a second dimension of ``batch / 8`` would tie programs to it."""
    nothing = like.new_empty(0, dtype=torch.uint8)
    return (
        nothing if kept.positive is None else kept.positive.view(-1),
        nothing.clone() if kept.kept is None else kept.kept.view(-1),
    )


def kept_of(epilogue: Epilogue, positive: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Kept:
    """The inverse of `flat_bits`, the bits having this shape."""
    return Kept(
        epilogue,
        positive.view(shape) if epilogue.slope != 1.0 else None,
        kept.view(shape) if epilogue.dropout > 0.0 else None,
    )
