"""Tensors in few bits: a scale for each group of neighbours, zeros exact, and a bitmap where many elements are zero.

Shapes: N elements in memory order, in G groups of E. An element is (code + base) * scale. The base is whole, so that zero lies on
the grid, but for groups without negative elements whose zeros are in a bitmap: there what is positive stays positive. The grid of a
group spans its range, or has a given step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from noctule.codecs.reference import nbytes
from noctule.kernels.native import available
from noctule.memory import native, reference

LEAST_GROUP, MOST_GROUP = 256, 4096
_SMALLEST, _PRECISION = 2.0**-100, 2.0**-20


@dataclass(frozen=True)
class Grouped:
    """An encoded tensor (N,)."""

    n: int
    group: int
    bits: int
    dtype: torch.dtype
    scale_G: Tensor
    base_G: Tensor
    codes: Tensor
    counts_G: Tensor | None
    """Codes of each group, int16, where there is a bitmap."""
    bitmap: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.scale_G, self.base_G, self.codes, self.counts_G, self.bitmap)
        return sum(part.nbytes for part in parts if part is not None)

    def decode(self) -> Tensor:
        """The tensor (N,) in its dtype; an element is off by half a step of its group at most."""
        offsets, _ = _offsets(self.counts_G, self.n, self.group, self.bits, self.codes.device)
        x_N = _code_for(self.codes).decode(
            self.codes, self.n, self.group, self.scale_G, self.base_G, self.bits, offsets, self.bitmap
        )
        return x_N.to(self.dtype)


def encode(x_N: Tensor, bits: int, group: int, step: float | None = None) -> Grouped | None:
    """The tensor in codes of so many bits, or None where an element is not finite.

    Args:
        x_N: contiguous; float32, or a half precision that is widened.
        bits: at most so many, from 1 to 8.
        group: neighbours that share a scale; see `group_of`.
        step: of the grid; fewer bits are used where they suffice for the mean range, and groups of a wider one take a larger step.
    """
    dtype, x_N = x_N.dtype, x_N.to(torch.float32)
    code, n = _code_for(x_N), x_N.numel()
    low, high, nonzeros = code.ranges(x_N, group)
    spread = high - low
    if not bool(spread.isfinite().all()):
        return None
    if step is not None:
        bits = min(bits, max(1, math.ceil(math.log2(float(spread.mean()) / step + 2.0))))
    filled = int(nonzeros.sum(dtype=torch.int64))
    counts = nonzeros if n + filled * bits < 1.1 * n * bits else None
    top = 2**bits - 1
    # half a step to spare, so that rounding both ends cannot need one code more; an end at zero is on the grid as it is
    steps = torch.where((low == 0) | (high == 0), float(top), top - 0.5)
    if counts is not None:
        steps = torch.where(low == 0, top + 1.0, steps)
    scale = (spread / steps).maximum(torch.maximum(low.abs(), high.abs()) * _PRECISION)
    scale = scale.clamp_(min=max(_SMALLEST, step or 0.0))
    inverse = scale.reciprocal()
    base = (low * inverse).round_() + 0.0
    if counts is not None:
        # zeros have no code: between the steps, what is positive stays so, on which the gradient of a ReLU rests
        base = torch.where(low >= 0, (low * inverse).floor_() + 0.5, base)
    offsets, total = _offsets(counts, n, group, bits, x_N.device)
    codes, bitmap = code.encode(x_N, group, inverse, base, bits, offsets, total, counts is not None)
    small = None if counts is None else counts.to(torch.int16)
    return Grouped(n, group, bits, dtype, scale, base, codes, small, bitmap)


def group_of(sizes: tuple[int, ...]) -> int:
    """Neighbours that share a scale: a channel's plane of one sample, or several where planes are small.

    Args:
        sizes: of the dimensions, in the order of memory.

    >>> group_of((128, 16, 28, 28)), group_of((128, 64, 7, 7)), group_of((128, 1000))
    (784, 392, 1000)
    """
    plane = math.prod(sizes[2:] if len(sizes) > 2 else sizes[1:] or sizes)
    whole = math.lcm(plane, 8)
    group = whole * -(-LEAST_GROUP // whole)
    return group if group <= MOST_GROUP else 2 * LEAST_GROUP


def _offsets(counts_G: Tensor | None, n: int, group: int, bits: int, device: torch.device) -> tuple[Tensor, int]:
    """Where the codes of each group begin, in bytes, and the bytes of all."""
    groups = -(-n // group)
    if counts_G is None:
        last = n - (groups - 1) * group
        each = nbytes(group, bits)
        return torch.arange(groups, device=device) * each, (groups - 1) * each + nbytes(last, bits)
    sizes = (counts_G.to(torch.int64) * bits + 7) // 8
    ends = sizes.cumsum(0)
    return ends - sizes, int(ends[-1])


def _code_for(x: Tensor):
    return native if x.is_cpu and available() else reference
