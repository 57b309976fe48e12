"""The sparse convolution as a registered operator, for ``torch.compile``; eager mode uses `SparseConvolution`."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from noctule import kernels
from noctule.kernels import Epilogue
from noctule.sparse.layers.convolution import Geometry, convolve, convolve_backward, shifted
from noctule.sparse.layers.operators import flat_bits, kept_of, topology_of


@torch.library.custom_op("noctule::sparse_conv2d", mutates_args=())
def compiled_convolution(
    x_BCHW: Tensor,
    values: Tensor,
    bias: Tensor | None,
    places: Sequence[Tensor],
    seed: Tensor,
    geometry: Sequence[int],
    slope: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (O, H', W', B) and the bits that its backward needs; ``places`` are those of `places_now`."""
    epilogue, g = Epilogue(slope, dropout, int(seed)), unpacked(geometry)
    y, kept, _ = convolve(topology_of(places, g.shape), g, values, bias, x_BCHW, epilogue, keep=True)
    return y.permute(1, 2, 3, 0).contiguous(), *flat_bits(kept, x_BCHW)


@compiled_convolution.register_fake
def _(x_BCHW, values, bias, places, seed, geometry, slope, dropout):
    g, batch = unpacked(geometry), x_BCHW.shape[0]
    high, wide = g.output_size((x_BCHW.shape[2], x_BCHW.shape[3]))

    def bits(there: bool) -> Tensor:
        return x_BCHW.new_empty(g.out_channels * high * ((wide * batch + 7) // 8) if there else 0, dtype=torch.uint8)

    y = x_BCHW.new_empty((g.out_channels, high, wide, batch), dtype=values.dtype)
    return y, bits(slope != 1.0), bits(dropout > 0.0)


@torch.library.custom_op("noctule::sparse_conv2d_backward", mutates_args=())
def compiled_backward(
    dy_OHWB: Tensor,
    x_BCHW: Tensor,
    values: Tensor,
    places: Sequence[Tensor],
    positive: Tensor,
    kept: Tensor,
    geometry: Sequence[int],
    slope: float,
    dropout: float,
    needs_x: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, C, H, W), dvalues (N,), dbias (O,); empty what is not needed, the last two going together."""
    g = unpacked(geometry)
    topology = topology_of(places, g.shape)
    image = x_BCHW.shape[2], x_BCHW.shape[3]
    frame = kernels.place(x_BCHW, shifted(topology, g, image, x_BCHW.shape[0]).frame)
    rows, high, wide, batch = dy_OHWB.shape
    state = kept_of(Epilogue(slope, dropout), positive, kept, (rows, high, (wide * batch + 7) // 8))
    dy = dy_OHWB.permute(3, 0, 1, 2)
    needs = (needs_x, needs_values, True)
    _, dx, dvalues, dbias = convolve_backward(topology, g, values, frame, image, dy, state, needs)
    assert dbias is not None
    return _or(dx, x_BCHW.new_empty(0)).contiguous(), _or(dvalues, values.new_empty(0)), dbias


@compiled_backward.register_fake
def _(dy_OHWB, x_BCHW, values, places, positive, kept, geometry, slope, dropout, needs_x, needs_values):
    dx = x_BCHW.new_empty(x_BCHW.shape if needs_x else (0,))
    return dx, values.new_empty(values.shape if needs_values else (0,)), dy_OHWB.new_empty(dy_OHWB.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BCHW, values, bias, places, _, ctx.geometry, ctx.slope, ctx.dropout = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x_BCHW, values, output[1], output[2], *places)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, dy_OHWB: Tensor, *_: Any) -> tuple[Any, ...]:
    x_BCHW, values, positive, kept = ctx.saved_tensors[:4]
    places = list(ctx.saved_tensors[4:])
    needs_x, needs_values = ctx.needs_input_grad[:2]
    dx, dvalues, dbias = compiled_backward(
        dy_OHWB, x_BCHW, values, places, positive, kept, ctx.geometry, ctx.slope, ctx.dropout, needs_x, needs_values
    )
    return (
        dx if needs_x else None,
        dvalues if needs_values else None,
        dbias if ctx.has_bias else None,
        [None] * len(places),
        None,
        None,
        None,
        None,
    )


compiled_convolution.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.noctule.sparse_conv2d)
def _(x_shape: Any, values_shape: Any, *_: Any, out_val: Any, **__: Any) -> int:
    _, high, wide, batch = out_val[0].shape
    return 2 * values_shape[0] * high * wide * batch


@register_flop_formula(torch.ops.noctule.sparse_conv2d_backward)
def _(dy_shape: Any, x_shape: Any, values_shape: Any, *rest: Any, **_: Any) -> int:
    return 2 * values_shape[0] * prod(dy_shape[1:]) * sum(rest[-2:])


def packed(geometry: Geometry) -> list[int]:
    """A geometry as the whole numbers that an operator takes."""
    g = geometry
    (top, bottom), (left, right) = g.padding
    return [
        g.in_channels, g.out_channels, *g.kernel_size, *g.stride, top, bottom, left, right, *g.dilation, g.groups
    ]  # fmt: skip


def unpacked(numbers: Sequence[int]) -> Geometry:
    """The inverse of `packed`."""
    into, out, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = numbers
    return Geometry(into, out, (kh, kw), (sh, sw), ((top, bottom), (left, right)), (dh, dw), groups)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x
