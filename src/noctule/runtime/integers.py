"""Products of int8 weights and uint8 activations: weights packed for the processor, and the calls of the kernels.

Activations are feature-major, (features, columns): the batch is innermost. Everything is decided here, once, when inference is
planned; a call is a compiled function and its arguments. Keep a packed weight and an `Epilogue` as long as their calls.

Shapes: O rows (out features or channels), K places of a dense row, N stored weights or blocks. Codes of activations are at most
``highest``: 7 bits (127) leave more room for sums of 16 bits, which products without VNNI are added in first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noctule.runtime import _native

Array = NDArray[Any]
Call = tuple[Callable[..., Any], tuple[int | float, ...]]

_FEW = 16  # fewer columns have kernels of their own


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


def _address(array: Array) -> int:
    return int(array.ctypes.data)


class SparseWeight:
    """Weights at any places: row o has ``values`` at ``offsets`` [row_ptr[o], row_ptr[o + 1])."""

    def __init__(self, row_ptr: Array, offsets: Array, values: Array, highest: int = 255) -> None:
        self.row_ptr = np.ascontiguousarray(row_ptr, np.int64)
        self.offsets, self.values = np.ascontiguousarray(offsets, np.int32), np.ascontiguousarray(values, np.int8)
        self.rows, self.highest = len(self.row_ptr) - 1, highest
        self.places = int(self.offsets.max(initial=-1)) + 1  # rows of x in use
        self._set, self._terms, self._lanes, self._window, *_ = _native.int8_layout()
        self._csr = (_address(self.row_ptr), _address(self.offsets), _address(self.values))
        self._many: tuple[Array, Array, int] | None = None
        self._rounds: tuple[Array, Array, Array, Array] | None = None

    def scratch_bytes(self, columns: int) -> int:
        """Bytes that the calls for so many columns need."""
        return (-(-self.places // 64) * columns + 1) * 64 if columns < _FEW else 0

    def calls(self, operands: Operands, epilogue: Epilogue) -> list[Call]:
        """The calls of one product."""
        tail = operands.arguments(self.rows, epilogue)
        few, many = self._few_costs(operands.columns)
        if many <= few:
            starts, words, group = self._records()
            return [(_native.int8_sparse, (self._set, _address(starts), _address(words), group, *tail))]
        scratch = (self.places, operands.scratch)
        if self._rounds is None:
            return [(_native.int8_few_list, (self._set, *self._csr, *scratch, *tail))]
        return [(_native.int8_few_rounds, (self._set, *map(_address, self._rounds), *scratch, *tail))]

    def _few_costs(self, columns: int) -> tuple[float, float]:
        return (0.0, 1.0) if columns < _FEW else (1.0, 0.0)

    def _records(self) -> tuple[Array, Array, int]:
        if self._many is None:
            sizes = (*self._csr, self.rows, self._terms)
            groups = (1, 2, 3, 4) if self._terms == 2 else (1,)
            counts = {g: _native.int8_pack_records(*sizes, g, self.highest, 0, 0) for g in groups}
            group = min(groups, key=lambda g: counts[g] * (12 * g + 12) / g)
            starts = np.empty(self.rows + 1, np.int64)
            words = np.empty(counts[group] * (self._terms + 1), np.int32)
            _native.int8_pack_records(*sizes, group, self.highest, _address(starts), _address(words))
            self._many = starts, words, group
        return self._many
