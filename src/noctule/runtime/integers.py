"""Products of int8 weights and uint8 activations: weights packed for the processor, and the calls of the kernels.

Activations are feature-major, (features, columns): the batch is innermost. Everything is decided here, once, when inference is
planned; a call is a compiled function and its arguments. Keep a packed weight and an `Epilogue` as long as their calls.

Shapes: O rows (out features or channels), K places of a dense row, N stored weights or blocks. Codes of activations are at most
``highest``: 7 bits (127) leave more room for sums of 16 bits, which products without VNNI are added in first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noctule.runtime import _native

Array = NDArray[Any]
Call = tuple[Callable[..., Any], tuple[int | float, ...]]

_FEW = 16  # fewer columns have kernels of their own
# Times of few columns in ns, as measured with AVX2: a weight of a list, a round of a column, a word of the records of 16 columns.
_LIST, _ROUND, _RECORD = 0.33, 0.9, 0.6


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What happens to a sum before it is stored: ``activate(float(sum + correction) * scale + bias)``, as float32 or as codes.

    Args:
        correction: int32 (O,), minus the zero point of the input times the sum of the row's weights.
        scale: float32 (O,).
        bias: float32 (O,).
        slope: of the negative side; 1 for no activation, 0 for ReLU.
        inverse: one over the scale of the result's grid; None stores float32.
        zero: zero point of the result's grid.
        highest: largest code of the result's grid.
        interleaved: store codes as (O / 4, columns, 4), which blocks read; strides of y then count groups of four bytes.
    """

    correction: Array
    scale: Array
    bias: Array
    slope: float = 1.0
    inverse: float | None = None
    zero: int = 0
    highest: int = 255
    interleaved: bool = False

    def __post_init__(self) -> None:
        for name, dtype in (("correction", np.int32), ("scale", np.float32), ("bias", np.float32)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        if self.interleaved and self.inverse is None:
            raise ValueError("only codes are stored interleaved: give `inverse`, or leave `interleaved` out")


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Where the input and the result of a product lie: addresses, and strides in elements.

    For n in ``columns``, ``y[o * y_ld + line * y_step + n]`` comes from the sum over k of
    ``w[o, k] * x[offsets[k] * ld + line * x_step + n]``. x may be read up to 64 bytes behind its end. ``scratch`` has as many bytes
    as ``scratch_bytes`` of the packed weight says.
    """

    x: int
    ld: int
    y: int
    y_ld: int
    columns: int
    x_step: int = 0
    y_step: int = 0
    lines: int = 1
    scratch: int = 0

    def arguments(self, rows: int, e: Epilogue) -> tuple[int | float, ...]:
        """The arguments that all products have in common."""
        store = 0 if e.inverse is None else 2 if e.interleaved else 1
        where = (self.x, self.ld, self.x_step, self.y, self.y_ld, self.y_step, rows, self.columns, self.lines)
        grid = (e.inverse or 0.0, float(e.zero), float(e.highest))
        return (*where, _address(e.correction), _address(e.scale), _address(e.bias), e.slope, store, *grid)


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


class SparseWeight:
    """Weights at any places: row o has ``values`` at ``offsets`` [row_ptr[o], row_ptr[o + 1])."""

    def __init__(self, row_ptr: Array, offsets: Array, values: Array, highest: int = 255) -> None:
        self.row_ptr = np.ascontiguousarray(row_ptr, np.int64)
        self.offsets, self.values = np.ascontiguousarray(offsets, np.int32), np.ascontiguousarray(values, np.int8)
        self.rows, self.highest = len(self.row_ptr) - 1, highest
        self.places = int(self.offsets.max(initial=-1)) + 1  # rows of x in use
        self._set, self._terms, self._lanes, self._window, *_ = _native.int8_layout()
        self._csr = (_address(self.row_ptr), _address(self.offsets), _address(self.values))

    def scratch_bytes(self, columns: int) -> int:
        """Bytes that the calls for so many columns need."""
        return (-(-self.places // 64) * columns + 1) * 64 if columns < _FEW else 0

    def calls(self, operands: Operands, epilogue: Epilogue) -> list[Call]:
        """The calls of one product."""
        tail, columns = operands.arguments(self.rows, epilogue), operands.columns
        scratch = (self.places, operands.scratch)
        listed = _LIST * len(self.values)
        rounds = _ROUND * len(self._rounds[1]) if columns < _FEW and self._window else np.inf
        if columns >= _FEW or columns * min(listed, rounds) > _RECORD * len(self._records[1]):
            starts, words, group = self._records
            return [(_native.int8_sparse, (self._set, _address(starts), _address(words), group, *tail))]
        if listed <= rounds:
            return [(_native.int8_few_list, (self._set, *self._csr, *scratch, *tail))]
        return [(_native.int8_few_rounds, (self._set, *map(_address, self._rounds), *scratch, *tail))]

    @cached_property
    def _records(self) -> tuple[Array, Array, int]:
        sizes = (*self._csr, self.rows, self._terms)
        groups = (1, 2, 3, 4) if self._terms == 2 else (1,)
        counts = {g: _native.int8_pack_records(*sizes, g, self.highest, 0, 0) for g in groups}
        group = min(groups, key=lambda g: counts[g] * (12 + 12 / g))  # operations
        starts = np.empty(self.rows + 1, np.int64)
        words = np.empty(counts[group] * (self._terms + 1), np.int32)
        _native.int8_pack_records(*sizes, group, self.highest, _address(starts), _address(words))
        return starts, words, group

    @cached_property
    def _rounds(self) -> tuple[Array, Array, Array, Array | None]:
        groups = -(-self.rows // self._lanes)
        sizes = (*self._csr, self.rows, self._lanes, self._window, self.highest if self._terms == 2 else 0)
        starts = np.empty(groups + 1, np.int64)
        orders = np.full((2, groups * self._lanes), -1, np.int32)
        orders[0, : self.rows] = np.arange(self.rows)
        orders[1, : self.rows] = np.argsort(-np.diff(self.row_ptr), kind="stable")  # rows of one length share rounds
        counts = [_native.int8_pack_rounds(*sizes, _address(order), _address(starts), 0, 0) for order in orders]
        best = int(counts[1] < 0.95 * counts[0])
        bases, data = np.empty(counts[best], np.int32), np.zeros((counts[best], 2, self._lanes, 4), np.int8)
        _native.int8_pack_rounds(*sizes, _address(orders[best]), _address(starts), _address(bases), _address(data))
        return starts, bases, data, orders[1] if best else None


class BlockWeight:
    """Blocks of four neighbouring places: row o has ``values`` (N, 4) at ``block_offsets`` (N,) [row_ptr[o], row_ptr[o + 1]).

    x is interleaved, (features / 4, columns, 4), and strides of x count groups of four bytes; `interleave` makes it, or the epilogue of the
    product before.
    """

    def __init__(self, row_ptr: Array, block_offsets: Array, values: Array, highest: int = 255) -> None:
        self.rows = len(row_ptr) - 1
        self._set, terms, *_ = _native.int8_layout()
        offsets, values = np.asarray(block_offsets, np.int32), np.asarray(values, np.int8)
        starts = np.asarray(row_ptr, np.int64)
        if terms == 2:  # pairs that could saturate go apart
            pairs = np.abs(values.reshape(-1, 2, 2).astype(np.int32).sum(2)).max(1, initial=0) > 32767 // highest
            rows = np.repeat(np.arange(self.rows), np.diff(starts))
            parts = np.repeat(np.arange(len(offsets)), 1 + pairs)
            second = np.r_[False, parts[1:] == parts[:-1]] if len(parts) else np.zeros(0, bool)
            offsets, values = offsets[parts], values[parts]
            values[pairs[parts] & ~second, 1::2] = 0
            values[second, ::2] = 0
            starts = np.r_[0, np.cumsum(np.bincount(rows[parts], minlength=self.rows))]
        self._starts = np.ascontiguousarray(starts, np.int64)
        self._words = np.ascontiguousarray(np.stack([offsets, np.ascontiguousarray(values).view(np.int32)[:, 0]], 1))

    def scratch_bytes(self, columns: int) -> int:
        """Bytes that the calls for so many columns need."""
        return 0

    def calls(self, operands: Operands, epilogue: Epilogue) -> list[Call]:
        """The calls of one product."""
        packed = (self._set, _address(self._starts), _address(self._words))
        return [(_native.int8_blocks, (*packed, *operands.arguments(self.rows, epilogue)))]


class DenseWeight:
    """A dense weight (O, K) whose place k is row ``offsets[k]`` of x, row k without them."""

    def __init__(self, weight: Array, offsets: Array | None = None, highest: int = 255) -> None:
        self.rows, self.places = weight.shape
        self._set, _, _, _, self._step, self._paired, self._together = _native.int8_layout()
        self._weight = np.asarray(weight, np.int8)
        in_order = offsets is None or np.array_equal(offsets, np.arange(self.places))
        self._offsets = None if in_order else np.ascontiguousarray(offsets, np.int32)

    def scratch_bytes(self, columns: int) -> int:
        """Bytes that the calls for so many columns need."""
        return -(-self.places // 64) * 64 * columns * (4 // self._paired) + 256

    def calls(self, operands: Operands, epilogue: Epilogue) -> list[Call]:
        """The calls of one product."""
        few = operands.columns < 8
        packed = (_address(self._offsets), _address(self._rows if few else self._tiles), self.places, operands.scratch)
        kernel = _native.int8_few_dense if few else _native.int8_dense
        return [(kernel, (self._set, *packed, *operands.arguments(self.rows, epilogue)))]

    def _padded(self, rows: int, places: int) -> Array:
        padded = np.zeros((-(-self.rows // rows) * rows, -(-self.places // places) * places), np.int8)
        padded[: self.rows, : self.places] = self._weight
        return padded

    @cached_property
    def _rows(self) -> Array:
        return self._padded(1, self._step)

    @cached_property
    def _tiles(self) -> Array:
        words = self._padded(self._together, self._paired).astype(np.int8 if self._paired == 4 else np.int16)
        tiles = words.reshape(len(words) // self._together, self._together, -1, self._paired)
        return np.ascontiguousarray(tiles.swapaxes(1, 2))


def interleave(x: int, ld: int, rows: int, columns: int, y: int) -> Call:
    """The call that brings rows of x, `ld` elements apart, into (ceil(rows / 4), columns, 4) at y; missing rows are zero."""
    return _native.int8_interleave, (_native.int8_layout()[0], x, ld, rows, columns, y)


def quantize(x: int, n: int, inverse: float, zero: int, highest: int, codes: int) -> Call:
    """The call that turns n float32 into codes; it returns whether one of them is NaN or infinite."""
    return _native.int8_quantize, (x, n, inverse, float(zero), float(highest), codes)


def dequantize(codes: int, n: int, scale: float, zero: int, x: int) -> Call:
    """The call that turns n codes into float32: ``(code - zero) * scale``."""
    return _native.int8_dequantize, (codes, n, scale, float(zero), x)
