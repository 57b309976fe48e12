"""Weights and activations as whole numbers of few bits.

Shapes: O rows (out features or channels), N stored weights of a sparse layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from noctule.codecs.levels import pack_codes, unpack_codes
from noctule.core.finite import all_finite
from noctule.core.topology import Topology

_SMALLEST = torch.finfo(torch.float32).smallest_normal


def check_bits(bits: int) -> None:
    """Refuse a number of bits that weights cannot have."""
    if bits not in (8, 4, 1):
        raise ValueError(f"weights have 8, 4 or 1 bits, got {bits}")


def over_rows(x: Tensor, how: str, topology: Topology | None = None) -> Tensor:
    """ "amax", "mean" or "sum" of each row (O,) of a weight (O, ...) or of sparse values (N,); 0 for a row without weights."""
    if topology is not None:
        return x.new_zeros(topology.shape[0]).scatter_reduce_(0, topology.rows(), x, how, include_self=False)
    flat = x.flatten(1)
    return getattr(flat, how)(1) if flat.shape[1] else flat.new_zeros(len(flat))


def spread(scales: Tensor, weight: Tensor, topology: Topology | None = None) -> Tensor:
    """Scales of rows (O,), broadcast to the shape of the weight."""
    if topology is not None:
        return scales.repeat_interleave(topology.row_ptr.diff().to(torch.int64), output_size=topology.size)
    return scales.view(-1, *[1] * (weight.dim() - 1))


def quantize_weight(weight: Tensor, bits: int = 8, topology: Topology | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric codes, int8 of the weight's shape, and the scale (O,) of each row, float32.

    With 8 or 4 bits a row's largest magnitude is 127 or 7 steps: a weight is off by half a step at most and zero stays zero. With
    one bit the codes are -1 and 1, and a row's scale is its mean magnitude, which has the least squared error (Rastegari, Ordonez,
    Redmon, Farhadi 2016, XNOR-Net, arXiv 1603.05279).

    Args:
        weight: (O, ...), or the values (N,) of a sparse layer.
        bits: 8, 4 or 1.
        topology: where the values of a sparse layer lie.

    Raises:
        ValueError: a weight is NaN or infinite.

    >>> codes, scales = quantize_weight(torch.tensor([[1.27, -0.5, 0.0]]))
    >>> codes.tolist(), dequantize_weight(codes, scales).tolist()
    ([[127, -50, 0]], [[1.2699..., -0.5, 0.0]])
    """
    check_bits(bits)
    w = weight.detach().to(torch.float32)
    if not all_finite(w):
        raise ValueError("a weight is NaN or infinite, which no whole number is: train again from finite weights")
    scales = over_rows(w.abs(), "mean" if bits == 1 else "amax", topology)
    if bits == 1:
        return torch.where(w < 0.0, -1, 1).to(torch.int8), scales
    top = 2 ** (bits - 1) - 1
    scales = torch.where(scales > 0.0, (scales / top).clamp_(min=_SMALLEST), 1.0)
    return (w / spread(scales, w, topology)).round_().clamp_(-top, top).to(torch.int8), scales


def dequantize_weight(codes: Tensor, scales: Tensor, topology: Topology | None = None) -> Tensor:
    """The weight again, float32."""
    return codes.to(torch.float32).mul_(spread(scales, codes, topology))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in as few bytes as they need: int8 as they are, two of 4 bits or eight of one bit a byte, flat."""
    if bits == 8:
        return codes
    return pack_codes((codes + 8 if bits == 4 else codes > 0).flatten().to(torch.uint8), bits)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes of this shape again, int8."""
    if bits == 8:
        return packed
    codes = unpack_codes(packed, torch.Size(shape).numel(), bits).view(torch.int8).view(shape)
    return codes - 8 if bits == 4 else codes * 2 - 1


class Grid(NamedTuple):
    """Affine quantisation of activations: scale times (code - zero_point), of codes from 0 to ``highest``."""

    scale: float
    zero_point: int
    highest: int = 255


def grid(low: float, high: float, *, bits: int = 8) -> Grid:
    """The grid of a range, which is widened to contain zero; zero lies on it exactly.

    Args:
        low: smallest number.
        high: largest number.
        bits: 8, or 7 where products may not saturate on processors without VNNI (see `Int8Layer`).

    >>> grid(-1.0, 1.55)
    Grid(scale=0.00999..., zero_point=100, highest=255)
    """
    if bits not in (7, 8):
        raise ValueError(f"activations have 7 or 8 bits, got {bits}")
    low, high, highest = min(low, 0.0), max(high, 0.0), 2**bits - 1
    if not high - low < torch.finfo(torch.float32).max:  # NaN too
        raise ValueError(f"a range from {low} to {high} is not finite: calibrate with finite batches")
    scale = torch.tensor((high - low) / highest, dtype=torch.float32).clamp_(min=_SMALLEST).item()
    return Grid(scale if high > low else 1.0, min(round(-low / scale), highest), highest)


def quantize(x: Tensor, to: Grid) -> Tensor:
    """Codes of activations, uint8: off by half a step at most within the range of the grid, cut at its ends outside.

    Raises:
        ValueError: an activation is NaN or infinite.
    """
    if not all_finite(x):
        raise ValueError(
            "an activation is NaN or infinite, which no whole number is: look at the input and the weights"
        )
    codes = x.to(torch.float32).mul(1.0 / to.scale).round_().add_(to.zero_point)
    return codes.clamp_(0, to.highest).to(torch.uint8)


def dequantize(codes: Tensor, of: Grid) -> Tensor:
    """Activations of codes, float32."""
    return codes.to(torch.float32).sub_(of.zero_point).mul_(of.scale)
