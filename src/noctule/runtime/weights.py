"""The weight of a product as a file holds it: values or codes, and the places of those that are not zero in few bytes.

Shapes: O rows, K columns, N stored weights.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

ESCAPE = 255
"""A gap of this byte leads on by so many places to the next byte, with no weight there."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the weights of a sparse matrix lie: a bit a place, or the gaps between weights, in reading order.

    A gap is the number of places without a weight before the next one, counted on from row to row, in one byte; 255 means 255
    places and no weight yet. So places rise by construction.
    """

    kind: Literal["bitmap", "gaps"]
    data: np.ndarray
    """Bytes: of a bitmap the lowest bit first, a row beginning in a byte of its own."""
    count: int

    def __post_init__(self) -> None:
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.count < 0:
            raise ValueError(f"places are a line of bytes and their number, got {self.data.dtype} and {self.count}")

    def flat(self, rows: int, columns: int) -> np.ndarray:
        """The places (N,) in reading order; raises ValueError where they are not those of such a matrix."""
        if self.kind == "bitmap":
            if len(self.data) != rows * -(-columns // 8):
                raise ValueError(f"a bitmap of {len(self.data):,} bytes is not of {rows} x {columns} places")
            bits = np.unpackbits(self.data.reshape(rows, -1), axis=1, bitorder="little")
            if bits[:, columns:].any():
                raise ValueError("the bitmap has places behind the end of a row")
            places = np.flatnonzero(bits[:, :columns])
        else:
            wide = np.int64 if len(self.data) > 2**22 else np.int32
            steps = self.data.astype(wide) + (self.data != ESCAPE)
            places = np.cumsum(steps, dtype=wide)[self.data != ESCAPE] - 1
            if len(self.data) and (self.data[-1] == ESCAPE or places[-1] >= rows * columns):
                raise ValueError(f"the gaps lead out of a matrix of {rows} x {columns} places")
        if len(places) != self.count:
            raise ValueError(f"{len(places):,} places are not {self.count:,}")
        return places

    @classmethod
    def smallest(cls, flat: np.ndarray, rows: int, columns: int) -> "Places":
        """The shorter of the two forms of sorted places."""
        skipped = np.diff(flat, prepend=-1) - 1
        escapes = skipped // ESCAPE
        if len(flat) + int(escapes.sum()) > rows * -(-columns // 8):
            bits = np.zeros(rows * columns, np.uint8)
            bits[flat] = 1
            return cls(
                "bitmap", np.packbits(bits.reshape(rows, columns), axis=1, bitorder="little").reshape(-1), len(flat)
            )
        gaps = np.full(len(flat) + int(escapes.sum()), ESCAPE, np.uint8)
        gaps[np.arange(len(flat)) + np.cumsum(escapes)] = skipped % ESCAPE
        return cls("gaps", gaps, len(flat))


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix (O, K), dense or sparse, of floats or of codes.

    Args:
        shape: (O, K).
        values: of a dense matrix row by row, of a sparse one by place: float32; int8 codes; or bytes, which hold the indices of
            a book, or two codes of 4 bits or eight of one bit each, the first in the lowest bits.
        bits: of a code; 32 for floats.
        scales: (O,), of the codes of each row.
        book: the floats that 8-bit indices name.
        places: of a sparse matrix.
        block: columns of a place; its weights lie together.
    """

    shape: tuple[int, int]
    values: np.ndarray
    bits: Literal[32, 8, 4, 1] = 32
    scales: np.ndarray | None = None
    book: np.ndarray | None = None
    places: Places | None = None
    block: Literal[1, 4] = 1

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if (
            min(self.shape) < 1
            or rows * columns > 2**31
            or columns % self.block
            or (self.block > 1 and self.places is None)
        ):
            raise ValueError(f"no matrix of {rows} x {columns} (places of {self.block} columns)")
        expected = np.float32 if self.bits == 32 else np.int8 if self.bits == 8 and self.book is None else np.uint8
        length = self.count if self.bits >= 8 else -(-self.count * self.bits // 8)
        if self.values.dtype != expected or self.values.shape != (length,):
            raise ValueError(
                f"values must be {np.dtype(expected)} ({length},), got {self.values.dtype} {self.values.shape}"
            )
        if self.book is not None and (self.bits != 8 or self.book.dtype != np.float32 or self.book.ndim != 1):
            raise ValueError("a book is a line of float32 for indices of 8 bits")
        if self.book is not None and int(self.values.max(initial=0)) >= len(self.book):
            raise ValueError(f"an index lies outside of a book of {len(self.book)} floats")
        if (self.scales is None) != (self.bits == 32 or self.book is not None):
            raise ValueError("codes have scales; floats and books have none")
        if self.scales is not None and (self.scales.dtype != np.float32 or self.scales.shape != (rows,)):
            raise ValueError(f"scales must be float32 ({rows},), got {self.scales.dtype} {self.scales.shape}")
        for floats in (self.scales, self.book, self.values if self.bits == 32 else None):
            if floats is not None and not np.isfinite(floats).all():
                raise ValueError("a weight or a scale is NaN or infinite")
        _ = self.flat  # decodes and checks the places

    @property
    def count(self) -> int:
        """Stored weights."""
        return math.prod(self.shape) if self.places is None else self.places.count * self.block

    @cached_property
    def flat(self) -> np.ndarray | None:
        """The places in reading order; None of a dense matrix."""
        return None if self.places is None else self.places.flat(self.shape[0], self.shape[1] // self.block)

    @property
    def columns(self) -> np.ndarray:
        """The column, or the block of columns, of each place, int32."""
        assert self.flat is not None
        return (self.flat % (self.shape[1] // self.block)).astype(np.int32)

    @property
    def row_ptr(self) -> np.ndarray:
        """Where the places of each row begin, (O + 1,) int64."""
        assert self.flat is not None
        return np.searchsorted(self.flat, np.arange(self.shape[0] + 1) * (self.shape[1] // self.block))

    @property
    def integers(self) -> np.ndarray:
        """The codes as int8: (O, K), (N,) or (N, block)."""
        codes = self.values
        if self.bits < 8:
            bits = np.unpackbits(codes.view(np.uint8), bitorder="little")[: self.count * self.bits].reshape(
                -1, self.bits
            )
            codes = (bits << np.arange(self.bits, dtype=np.uint8)).sum(1, dtype=np.uint8).view(np.int8)
            codes = codes * 2 - 1 if self.bits == 1 else codes - 8
        return self._shaped(codes.view(np.int8))

    def row_sums(self) -> np.ndarray:
        """The sum of each row's codes, (O,) int64."""
        if self.flat is None:
            return self.integers.sum(1, dtype=np.int64)
        sums = np.concatenate([[0], np.cumsum(self.integers.reshape(-1), dtype=np.int64)])
        return np.diff(sums[self.row_ptr * self.block])

    @property
    def floats(self) -> np.ndarray:
        """The weights as float32: (O, K), (N,) or (N, block)."""
        if self.book is not None:
            return self._shaped(self.book[self.values])
        if self.scales is None:
            return self._shaped(self.values)
        codes = self.integers.astype(np.float32)
        scales = self.scales if self.flat is None else np.repeat(self.scales, np.diff(self.row_ptr))
        return codes * (scales[:, None] if codes.ndim == 2 else scales)

    def dense(self, floats: np.ndarray) -> np.ndarray:
        """Numbers in the shape of `floats` as a matrix (O, K) with its zeros."""
        if self.flat is None:
            return floats
        matrix = np.zeros((math.prod(self.shape) // self.block, self.block), floats.dtype)
        matrix[self.flat] = floats.reshape(-1, self.block)
        return matrix.reshape(self.shape)

    def _shaped(self, numbers: np.ndarray) -> np.ndarray:
        if self.places is None:
            return numbers.reshape(self.shape)
        return numbers if self.block == 1 else numbers.reshape(-1, self.block)
