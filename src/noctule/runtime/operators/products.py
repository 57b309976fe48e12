"""Linear layers and convolutions, dense or sparse, of floats or of codes, with bias and activation in the same pass.

A convolution is the product of its weight as a matrix with rows that overlap: with the batch innermost, place (c, i, j) of the
kernel reads a whole row of the padded image, beginning further on. So both have the same kernels; a convolution has a table of
where the rows of its input begin, and one line of columns for each row of the output image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from noctule.runtime import _native, integers
from noctule.runtime.operators.base import Buffer, Call, Operator, Plan, check, line
from noctule.runtime.values import MOST_NUMBERS, Grid, Value
from noctule.runtime.weights import Weight

Pair = tuple[int, int]

SPARSE_BELOW = 0.35
"""The share of stored weights up to which a product by places is faster than the dense one."""

BLOCKS_FROM = 4
"""Columns from which blocks of codes have a kernel of their own."""
MOST_TERMS = (2**31 - 1) // (127 * 255) // 2
"""Products of codes in a sum, and as many for its zero point."""
FEW = 8
"""Lanes up to which a dense product is one of lines of single samples."""


class Rows(NamedTuple):
    """Where a product reads and writes, in numbers of one lane."""

    starts: np.ndarray
    """Of the row of the input that each column of the weight reads, (K,) int32, or (G, K) of G groups."""
    columns: int
    """Of a line."""
    lines: int
    from_line: int
    """From one line of the input to the next."""
    to_line: int
    to_row: int
    """From one row of the output to the next."""

    @property
    def key(self) -> tuple[int, ...]:
        """What differs between the tables of one operator."""
        return self.columns, self.lines, self.from_line

    @property
    def contiguous(self) -> bool:
        """Whether a line of the input is one row after the other."""
        return self.starts.ndim == 1 and self.from_line == len(self.starts) and self.columns == 1


@dataclass(frozen=True, eq=False)
class Product(Operator):
    """What a linear layer and a convolution share: y = activation(W x + bias).

    Args:
        weight: (O, K).
        bias: (O,).
        slope: of the negative side: 1 is no activation, 0 ReLU.
        to: the grid that results are rounded to; None: they stay float32.
    """

    weight: Weight
    bias: np.ndarray | None = None
    slope: float = 1.0
    to: Grid | None = None

    def __post_init__(self) -> None:
        line(self.bias, self.weight.shape[0], "bias")

    def result(self, x: Value, shape: tuple[int, ...]) -> Value:
        """What comes out; refuses tokens, and codes with a weight that is not of 8 bits."""
        check(x.kind != "tokens", "a product reads floats or codes, not tokens")
        if x.grid is not None:
            check(self.weight.scales is not None, "codes need a weight of codes")
            check(
                self.weight.shape[1] <= MOST_TERMS,
                f"sums of more than {MOST_TERMS} products of codes do not fit into 32 bits",
            )
        check(self.to is None or x.grid is not None, "only products of codes are rounded to codes")
        return Value(shape, "codes" if self.to else "float32", self.to)

    def finish(self, product: np.ndarray, grid: Grid | None, axis: int) -> np.ndarray:
        """Scales, bias, activation and rounding of exact sums, in the order of the kernels."""
        row = [1] * product.ndim
        row[axis] = -1
        y = product.astype(np.float32)
        if grid is not None:
            y = y * self._scales(grid).reshape(row)
        if self.bias is not None:
            y = y + self.bias.reshape(row)
        if self.slope != 1.0:
            y = np.where(y > 0, y, y * np.float32(self.slope))
        return y if self.to is None else self.to.codes(y)

    def matrix(self, grid: Grid | None) -> np.ndarray:
        """The weight with its zeros: integers for codes, else floats."""
        return self.weight.dense(self.weight.floats if grid is None else self.weight.integers.astype(np.float64))

    def product(self, plan: Plan, x: Buffer, address: int, y: Buffer, rows: Rows) -> list[Call]:
        """The calls that read rows from an address."""
        lanes, w = x.lanes, self.weight
        reads = (address, lanes, rows.from_line * lanes, y.address, rows.to_row * lanes, rows.to_line * lanes)
        where = (*reads, rows.columns * lanes, rows.lines)
        if x.value.grid is not None:
            return self._integer_calls(plan, x.value.grid, rows, where)
        added = self.bias
        bias = 0 if added is None else plan.held((self, "bias"), lambda: added)
        if rows.starts.ndim == 1 and (w.flat is None or w.count > SPARSE_BELOW * w.shape[0] * w.shape[1]):
            starts = plan.held((self, "starts", rows.key), lambda: rows.starts)
            if rows.columns * lanes == 1 and rows.contiguous:
                weight = plan.held((self, "rows"), lambda: w.dense(w.floats))
                return [(_native.dots, (*w.shape, weight, *where, bias, self.slope))]
            if rows.contiguous and rows.lines == 1 and lanes < FEW:  # as so many lines, each of one sample
                weight = plan.held((self, "rows"), lambda: w.dense(w.floats))
                depth, across = w.shape[1], plan.scratch(4 * lanes * w.shape[1])
                lines = (across, 1, depth, y.address, lanes, 1, 1, lanes)
                turned = (_native.leave, (address, lanes, lanes, depth, across))
                return [turned, (_native.dots, (*w.shape, weight, *lines, bias, self.slope))]
            weight = plan.held((self, "packed"), lambda: packed(w.dense(w.floats)))
            return [(_native.dense, (*w.shape, weight, starts, *where, bias, self.slope))]
        row_ptr, starts, values = plan.keep((self, "places", rows.key), lambda: self._places(rows, w.floats))
        arrays = (row_ptr.ctypes.data, starts.ctypes.data, values.ctypes.data)
        return [(_native.sparse, (w.shape[0], *arrays, *where, bias, self.slope))]

    def _integer_calls(self, plan: Plan, grid: Grid, rows: Rows, where: tuple[int, ...]) -> list[Call]:
        address, ld, x_step, y, y_ld, y_step, columns, lines = where
        w, to, before = self.weight, self.to, list[Call]()
        if w.flat is None and rows.starts.ndim == 1:
            made = plan.keep(
                (self, "dense", rows.key), lambda: integers.DenseWeight(w.integers, rows.starts, grid.highest)
            )
        elif w.block > 1 and lines == 1 and columns >= BLOCKS_FROM:
            made = plan.keep(
                (self, "blocks"), lambda: integers.BlockWeight(w.row_ptr, w.columns, w.integers, grid.highest)
            )
            across = plan.scratch(w.shape[1] * columns)
            before = [integers.interleave(address, ld, w.shape[1], columns, across)]
            address, ld = across, columns
        else:
            made = plan.keep(
                (self, "sparse", rows.key),
                lambda: integers.SparseWeight(*self._places(rows, w.integers), grid.highest),
            )
        scratch = plan.scratch(made.scratch_bytes(columns))
        operands = integers.Operands(
            x=address,
            ld=ld,
            x_step=x_step,
            y=y,
            y_ld=y_ld,
            y_step=y_step,
            columns=columns,
            lines=lines,
            scratch=scratch,
        )
        return before + made.calls(operands, plan.keep((self, "epilogue"), lambda: self._epilogue(grid, to)))

    def _epilogue(self, grid: Grid, to: Grid | None) -> integers.Epilogue:
        rows = self.weight.shape[0]
        sums = self.weight.row_sums()
        return integers.Epilogue(
            correction=-grid.zero_point * sums,
            scale=self._scales(grid),
            bias=np.zeros(rows, np.float32) if self.bias is None else self.bias,
            slope=self.slope,
            inverse=None if to is None else float(to.inverse),
            zero=0 if to is None else to.zero_point,
            highest=255 if to is None else to.highest,
        )

    def _scales(self, grid: Grid) -> np.ndarray:
        assert self.weight.scales is not None
        return self.weight.scales * np.float32(grid.scale)

    def _places(self, rows: Rows, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where rows begin (O + 1,), what each weight reads (N,), and the weight; of a dense matrix all are stored."""
        (count, columns), w = self.weight.shape, self.weight
        if w.flat is None:
            row_ptr, column = np.arange(count + 1) * columns, np.tile(np.arange(columns), count)
        else:
            row_ptr, column = w.row_ptr * w.block, (w.columns[:, None] * w.block + np.arange(w.block)).reshape(-1)
        starts = np.atleast_2d(rows.starts)
        group = np.repeat(np.arange(count) // (count // len(starts)), np.diff(row_ptr))
        read = np.ascontiguousarray(starts[group, column], np.int32)
        return row_ptr.astype(np.int32), read, np.ascontiguousarray(numbers.reshape(-1))


def integers_of(x: np.ndarray, grid: Grid | None) -> np.ndarray:
    """Codes without their zero point, as float64 (their products and sums are exact); floats as they are."""
    return x if grid is None else x.astype(np.float64) - grid.zero_point


def packed(weight: np.ndarray) -> np.ndarray:
    """A dense weight (O, K) in blocks of rows, (O / R, K, R), as the kernel reads it."""
    high = _native.dense_rows()
    rows = -(-len(weight) // high) * high
    padded = np.zeros((rows, weight.shape[1]), np.float32)
    padded[: len(weight)] = weight
    return np.ascontiguousarray(padded.reshape(-1, high, weight.shape[1]).transpose(0, 2, 1))


@dataclass(frozen=True, eq=False)
class Linear(Product):
    """y (..., O) = activation(x (..., K) W^T + bias)."""

    def infer(self, *inputs: Value) -> Value:
        (x,) = inputs
        check(x.shape[-1:] == self.weight.shape[1:], f"a weight of {self.weight.shape} does not read {x.shape}")
        return self.result(x, (*x.shape[:-1], self.weight.shape[0]))

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        x, grid = integers_of(inputs[0], values[0].grid), values[0].grid
        return self.finish(x @ self.matrix(grid).T, grid, -1)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,), (count, columns) = inputs, self.weight.shape
        rows = Rows(np.arange(columns, dtype=np.int32), 1, math.prod(x.shape[:-1]), columns, count, 1)
        return self.product(plan, x, x.address, output, rows)


@dataclass(frozen=True, eq=False)
class Conv2d(Product):
    """y (O, H', W') = activation(W * x (C, H, W) + bias), the weight as a matrix (O, C / G x KH x KW).

    Args:
        kernel: (KH, KW).
        padding: zeros above and below, left and right.
        groups: G.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1

    def infer(self, *inputs: Value) -> Value:
        (x,), (count, columns) = inputs, self.weight.shape
        check(len(x.shape) == 3, f"a convolution reads images (C, H, W), not {x.shape}")
        check(self.weight.block == 1, "blocks are of linear layers: their columns lie next to each other in the input")
        check(
            min(*self.kernel, *self.stride, *self.dilation, self.groups) >= 1,
            "kernel, stride, dilation and groups are at least 1",
        )
        check(min(*self.padding[0], *self.padding[1]) >= 0, f"padding is at least 0, got {self.padding}")
        channels = x.shape[0] // self.groups
        check(
            x.shape[0] == channels * self.groups and count % self.groups == 0,
            f"{self.groups} groups do not divide the channels",
        )
        check(
            columns == channels * math.prod(self.kernel),
            f"a weight of {self.weight.shape} does not read {x.shape} in {self.kernel}",
        )
        size = tuple(
            (x.shape[k + 1] + sum(self.padding[k]) - self.dilation[k] * (self.kernel[k] - 1) - 1) // self.stride[k] + 1
            for k in (0, 1)
        )
        check(min(size) >= 1, f"a kernel of {self.kernel} does not fit an image of {x.shape}")
        frame = self._frame(size)
        check(x.shape[0] * math.prod(frame) <= MOST_NUMBERS, f"the padded image is too large: {frame}")
        return self.result(x, (count, *size))

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        x, grid = integers_of(inputs[0], values[0].grid), values[0].grid
        x = np.pad(x, ((0, 0), (0, 0), *self.padding))
        extent = [self.dilation[k] * (self.kernel[k] - 1) + 1 for k in (0, 1)]
        seen = np.lib.stride_tricks.sliding_window_view(x, extent, (2, 3))
        seen = seen[:, :, :: self.stride[0], :: self.stride[1], :: self.dilation[0], :: self.dilation[1]]
        batch, channels, high, wide = seen.shape[:4]
        seen = seen.reshape(batch, self.groups, channels // self.groups, high, wide, -1)
        weight = self.matrix(grid).reshape(self.groups, -1, channels // self.groups, math.prod(self.kernel))
        y = np.einsum("bgchwk,gock->bgohw", seen, weight, optimize=True)
        return self.finish(y.reshape(batch, -1, high, wide), grid, 1)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,), size = inputs, output.shape[1:]
        _, phases_wide, high, wide = frame = self._frame(size)
        (top, _), (left, _) = self.padding
        whole = self.stride == (1, 1) and self.padding == ((0, 0), (0, 0))
        framed, address = [], x.address
        if not whole:
            address = plan.scratch(x.shape[0] * math.prod(frame) * x.lanes * x.bytes_each)
            zero = 0 if x.value.grid is None else x.value.grid.zero_point
            shape = (*x.shape, x.lanes, top, left, *self.stride, *frame)
            framed = [(_native.frame, (x.bytes_each, x.address, *shape, zero, address))]
        down, right = (np.arange(self.kernel[k]) * self.dilation[k] for k in (0, 1))
        phase = (down % self.stride[0])[:, None] * phases_wide + (right % self.stride[1])[None]
        place = (phase * high + (down // self.stride[0])[:, None]) * wide + (right // self.stride[1])[None]
        channel = np.arange(x.shape[0]) * math.prod(frame)
        starts = (channel[:, None, None] + place).reshape(self.groups, -1).astype(np.int32)
        lines, columns = (1, math.prod(size)) if wide == size[1] else size
        rows = Rows(starts if self.groups > 1 else starts[0], columns, lines, wide, size[1], math.prod(size))
        return framed + self.product(plan, x, address, output, rows)

    def _frame(self, size: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Phases and size of the padded image, cut where it strides: (PH, PW, high, wide)."""
        last = [self.dilation[k] * (self.kernel[k] - 1) for k in (0, 1)]
        phases = [min(self.stride[k], last[k] + 1) for k in (0, 1)]
        high, wide = (size[k] + last[k] // self.stride[k] for k in (0, 1))
        return phases[0], phases[1], high, wide
