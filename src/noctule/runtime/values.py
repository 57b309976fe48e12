"""What flows between the steps of a graph: arrays of a shape per sample, as floats, codes or tokens."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

MOST_NUMBERS = 2**28
"""Of one sample in one value: a gigabyte of float32."""


@dataclass(frozen=True)
class Grid:
    """Affine quantisation of activations: scale times (code - zero_point), of codes from 0 to ``highest``."""

    scale: float
    zero_point: int
    highest: int = 255

    def __post_init__(self) -> None:
        if not (self.scale >= 1.1754944e-38 and 0 <= self.zero_point <= self.highest <= 255 and self.highest > 0):
            raise ValueError(
                f"no grid of codes: scale {self.scale}, zero_point {self.zero_point}, highest {self.highest}"
            )

    @property
    def inverse(self) -> np.float32:
        """What activations are multiplied by."""
        return np.float32(1.0 / self.scale)

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Activations -> codes, uint8."""
        codes = np.rint(x.astype(np.float32) * self.inverse) + np.float32(self.zero_point)
        return np.clip(codes, 0, self.highest).astype(np.uint8)

    def floats(self, codes: np.ndarray) -> np.ndarray:
        """Codes -> activations, float32."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


@dataclass(frozen=True)
class Value:
    """One value of a graph: its shape without the batch, and what its numbers are."""

    shape: tuple[int, ...]
    kind: Literal["float32", "codes", "tokens"] = "float32"
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if min(self.shape, default=1) < 1 or len(self.shape) > 8 or math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(
                f"no sample has shape {self.shape}: up to 8 sizes of at least 1, {MOST_NUMBERS:,} numbers in all"
            )
        if (self.kind == "codes") != (self.grid is not None):
            raise ValueError("codes have a grid, other values have none")

    @property
    def numbers(self) -> int:
        """In one sample."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers: tokens are int32."""
        return np.dtype({"float32": np.float32, "codes": np.uint8, "tokens": np.int32}[self.kind])

    def floats(self) -> "Value":
        """The value itself; raises ValueError if it is not float32."""
        if self.kind != "float32":
            raise ValueError(f"the step computes in float32 and reads {self.kind}")
        return self

    def like(self, *shape: int) -> "Value":
        """The same numbers in another shape."""
        return Value(shape, self.kind, self.grid)
