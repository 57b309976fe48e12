"""Products of int8 weights and uint8 activations: weights packed for the processor, and the calls of the kernels.

Activations are feature-major, (features, columns): the batch is innermost. Everything is decided here, once, when inference is
planned; a call is a compiled function and its arguments. Keep a packed weight and an `Epilogue` as long as their calls.

Shapes: O rows (out features or channels), K places of a dense row, N stored weights or blocks. Codes of activations are at most
``highest``: 7 bits (127) leave more room for sums of 16 bits, which products without VNNI are added in first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noctule.runtime import _native

Array = NDArray[Any]
Call = tuple[Callable[..., Any], tuple[int | float, ...]]

_FEW = 32  # from here on a record is always cheaper than rounds
# Times in ns, as measured with AVX2: of a column a round and a row, of up to 32 columns a word of the records and a row.
_ROUNDS, _RECORDS = (1.2, 2.0), (0.43, 16.0)


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
    """

    correction: Array
    scale: Array
    bias: Array
    slope: float = 1.0
    inverse: float | None = None
    zero: int = 0
    highest: int = 255

    def __post_init__(self) -> None:
        for name, dtype in (("correction", np.int32), ("scale", np.float32), ("bias", np.float32)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))


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


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def _call(kernel: str, set: int, weights: tuple[int, ...], o: Operands, rows: int, e: Epilogue) -> Call:
    where = (o.scratch, o.x, o.ld, o.x_step, o.y, o.y_ld, o.y_step, rows, o.columns, o.lines)
    arrays = (_address(e.correction), _address(e.scale), _address(e.bias))
    grid = (e.slope, e.inverse is not None, e.inverse or 0.0, float(e.zero), float(e.highest))
    return getattr(_native, f"int8_{kernel}"), (set, *weights, *where, *arrays, *grid)


class SparseWeight:
    """Weights at any places: row o has ``values`` at ``offsets`` [row_ptr[o], row_ptr[o + 1])."""

    def __init__(self, row_ptr: Array, offsets: Array, values: Array, highest: int = 255) -> None:
        self._row_ptr, self._offsets = np.ascontiguousarray(row_ptr, np.int64), np.ascontiguousarray(offsets, np.int32)
        self._values = np.ascontiguousarray(values, np.int8)
        self.rows, self._highest = len(self._row_ptr) - 1, highest
        self._places = int(self._offsets.max(initial=-1)) + 1  # rows of x in use
        self._set, self._terms, self._lanes, self._window, *_ = _native.int8_layout()
        self._csr = (_address(self._row_ptr), _address(self._offsets), _address(self._values), self.rows)

    def scratch_bytes(self, columns: int) -> int:
        """Bytes that the calls for so many columns need."""
        return (-(-self._places // 64) * columns + 1) * 64 if columns < _FEW else 0

    def calls(self, operands: Operands, epilogue: Epilogue) -> list[Call]:
        """The calls of one product."""
        if self._window and operands.columns < _FEW and self._prefers_rounds(operands.columns):
            starts, bases, data, order = self._rounds
            weights = (_address(starts), 0, 0, _address(bases), _address(data), _address(order), self._places)
            return [_call("few_rounds", self._set, weights, operands, self.rows, epilogue)]
        starts, words, group = self._records
        weights = (_address(starts), _address(words), group, 0, 0, 0, 0)
        return [_call("sparse", self._set, weights, operands, self.rows, epilogue)]

    def _prefers_rounds(self, columns: int) -> bool:
        column = _ROUNDS[0] * len(self._rounds[1]) + _ROUNDS[1] * self.rows
        return columns * column < _RECORDS[0] * len(self._records[1]) + _RECORDS[1] * self.rows

    @cached_property
    def _records(self) -> tuple[Array, Array, int]:
        pack = partial(_native.int8_pack_records, *self._csr, self._terms)
        groups = (1, 2, 3, 4) if self._terms == 2 else (1,)
        counts = {group: pack(group, self._highest, 0, 0) for group in groups}
        group = min(groups, key=lambda g: counts[g] * (12 + 8 / g))  # operations
        starts, words = np.empty(self.rows + 1, np.int64), np.empty(counts[group] * (self._terms + 1), np.int32)
        pack(group, self._highest, _address(starts), _address(words))
        return starts, words, group

    @cached_property
    def _rounds(self) -> tuple[Array, Array, Array, Array | None]:
        pack = partial(_native.int8_pack_rounds, *self._csr, self._lanes, self._window)
        limit, groups = self._highest if self._terms == 2 else 0, -(-self.rows // self._lanes)
        starts, orders = np.empty(groups + 1, np.int64), np.full((2, groups * self._lanes), -1, np.int32)
        orders[:, : self.rows] = np.arange(self.rows), np.argsort(-np.diff(self._row_ptr), kind="stable")
        counts = [pack(limit, _address(order), _address(starts), 0, 0) for order in orders]
        best = int(counts[1] < 0.95 * counts[0])  # rows of one length may share rounds better
        bases, data = np.empty(counts[best], np.int32), np.zeros((counts[best], 2, self._lanes, 4), np.int8)
        pack(limit, _address(orders[best]), _address(starts), _address(bases), _address(data))
        return starts, bases, data, orders[1] if best else None


class BlockWeight:
    """Blocks of four neighbouring places: row o has ``values`` (N, 4) at ``block_offsets`` (N,) [row_ptr[o], row_ptr[o + 1]).

    x is interleaved, (features / 4, columns, 4), and its strides count groups of four bytes: `interleave` makes it.
    """

    def __init__(self, row_ptr: Array, block_offsets: Array, values: Array, highest: int = 255) -> None:
        self.rows = len(row_ptr) - 1
        self._set, terms, *_ = _native.int8_layout()
        starts, offsets, values = np.asarray(row_ptr, np.int64), np.asarray(block_offsets), np.array(values, np.int8)
        if terms == 2:  # the two places of a pair that could saturate go apart
            sums = np.abs(values.reshape(-1, 2, 2).astype(np.int32).sum(2)).max(1, initial=0)
            times = 1 + (sums > 32767 // highest)
            ends = np.r_[0, np.cumsum(times)]
            parts = np.repeat(np.arange(len(times)), times)
            offsets, values, starts = offsets[parts], values[parts], ends[starts]
            values[ends[:-1][times == 2], 1::2] = 0
            values[ends[1:][times == 2] - 1, ::2] = 0
        self._starts = np.ascontiguousarray(starts, np.int64)
        self._words = np.stack([offsets.astype(np.int32), np.ascontiguousarray(values).view(np.int32)[:, 0]], 1)

    def scratch_bytes(self, columns: int) -> int:
        """Bytes that the calls for so many columns need."""
        return 0

    def calls(self, operands: Operands, epilogue: Epilogue) -> list[Call]:
        """The calls of one product."""
        weights = (_address(self._starts), _address(self._words), 0, 0, 0, 0, 0)
        return [_call("blocks", self._set, weights, operands, self.rows, epilogue)]


class DenseWeight:
    """A dense weight (O, K) whose place k is row ``offsets[k]`` of x, row k without them."""

    def __init__(self, weight: Array, offsets: Array | None = None, highest: int = 255) -> None:
        (self.rows, self._places), self._highest = weight.shape, highest
        self._set, self._terms, _, _, self._together = _native.int8_layout()
        self._weight = np.asarray(weight, np.int8)
        in_order = offsets is None or np.array_equal(offsets, np.arange(self._places))
        self._offsets = None if in_order else np.ascontiguousarray(offsets, np.int32)

    def scratch_bytes(self, columns: int) -> int:
        """Bytes that the calls for so many columns need."""
        return (-(-self._places // 64) * min(columns, 64) + 4) * 64

    def calls(self, operands: Operands, epilogue: Epilogue) -> list[Call]:
        """The calls of one product."""
        few = operands.columns < 8
        starts, words, data = (None, None, self._rows) if few else self._tiles
        weights = (_address(starts), _address(words), 0, 0, _address(data), _address(self._offsets), self._places)
        return [_call("few_dense" if few else "dense", self._set, weights, operands, self.rows, epilogue)]

    @cached_property
    def _rows(self) -> Array:
        return np.pad(self._weight, ((0, -self.rows % 8), (0, -self._places % 64)))

    @cached_property
    def _tiles(self) -> tuple[Array, Array, Array]:
        weight = np.pad(self._weight, ((0, -self.rows % self._together), (0, -self._places % 4)))
        pairs = weight.reshape(len(weight), -1, 2)
        rest = np.zeros_like(pairs)
        if self._terms == 2:  # of a pair that could saturate, a part of the larger weight goes into records
            sums, limit = pairs.sum(2, dtype=np.int32), 32767 // self._highest
            larger = np.abs(pairs.astype(np.int32)).argmax(2)[..., None]
            np.put_along_axis(rest, larger, (sums - sums.clip(-limit, limit)).astype(np.int8)[..., None], 2)
        row, word = np.nonzero(rest.reshape(len(weight), -1, 4).any(2))
        starts = np.searchsorted(row, np.arange(len(weight) + 1))
        words = np.stack([word.astype(np.int32), rest.reshape(len(weight), -1, 4)[row, word].view(np.int32)[:, 0]], 1)
        tiles = (pairs - rest).reshape(-1, self._together, weight.shape[1] // 4, 4).swapaxes(1, 2)
        return starts.astype(np.int64), words, np.ascontiguousarray(tiles)


def interleave(x: int, ld: int, rows: int, columns: int, y: int) -> Call:
    """The call that brings rows at x, ``ld`` elements apart, into (ceil(rows / 4), columns, 4) at y; missing rows are zero."""
    return _native.int8_interleave, (_native.int8_layout()[0], x, ld, rows, columns, y)


def quantize(x: int, n: int, inverse: float, zero: int, highest: int, codes: int) -> Call:
    """The call that turns n float32 at x into codes; it returns whether one of them is NaN or infinite."""
    return _native.int8_quantize, (_native.int8_layout()[0], x, n, inverse, float(zero), float(highest), codes)
