"""What makes fewer numbers of many: pooling and means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from noctule.runtime import _native
from noctule.runtime.operators.base import Buffer, Call, Operator, Plan, check
from noctule.runtime.values import Value

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Pool(Operator):
    """The largest number, or the mean, of each window of an image.

    Args:
        how: "max", "mean" of the window, or "mean inside": of its pixels that lie in the image.
        padding: pixels above and below, left and right, which are never the largest, and zero in a mean.
    """

    how: str
    kernel: Pair
    stride: Pair
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))

    def infer(self, *inputs: Value) -> Value:
        (x,) = inputs
        check(self.how in ("max", "mean", "mean inside"), f"there is no pooling {self.how!r:.50}")
        check(x.kind == "float32" or (self.how == "max" and x.kind == "codes"), f"{self.how} is not of {x.kind}")
        check(len(x.shape) == 3, f"pooling reads images (C, H, W), not {x.shape}")
        check(min(*self.kernel, *self.stride) >= 1, "kernel and stride are at least 1")
        for k in (0, 1):
            check(
                min(self.padding[k]) >= 0 and max(self.padding[k]) < self.kernel[k], "padding is less than the kernel"
            )
        size = [(x.shape[k + 1] + sum(self.padding[k]) - self.kernel[k]) // self.stride[k] + 1 for k in (0, 1)]
        check(min(size) >= 1, f"a window of {self.kernel} does not fit an image of {x.shape}")
        return x.like(x.shape[0], *size)

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        (x,) = inputs
        fill = 0 if self.how != "max" or x.dtype == np.uint8 else -np.inf
        sides = ((0, 0), (0, 0), *self.padding)

        def windows(of: np.ndarray, fill: float) -> np.ndarray:
            padded = np.pad(of, sides, constant_values=fill)
            seen = np.lib.stride_tricks.sliding_window_view(padded, self.kernel, (2, 3))
            return seen[:, :, :: self.stride[0], :: self.stride[1]]

        if self.how == "max":
            return windows(x, fill).max((-2, -1))
        count = math.prod(self.kernel) if self.how == "mean" else windows(np.ones_like(x), 0).sum((-2, -1))
        return (windows(x, 0).sum((-2, -1)) / count).astype(np.float32)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,), (top, left) = inputs, (self.padding[0][0], self.padding[1][0])
        sizes = (*x.shape, *output.shape[1:], x.lanes, *self.kernel, *self.stride, top, left)
        if self.how == "max":
            return [(_native.max_pool, (x.bytes_each, x.address, output.address, *sizes))]
        return [(_native.mean_pool, (x.address, output.address, *sizes, self.how == "mean inside"))]


@dataclass(frozen=True, eq=False)
class Mean(Operator):
    """The mean along axes that follow one another, which vanish; of an image's pixels, of tokens."""

    first: int
    last: int

    def infer(self, *inputs: Value) -> Value:
        x = inputs[0].floats()
        check(0 <= self.first <= self.last < len(x.shape), f"{x.shape} has no axes {self.first} to {self.last}")
        return Value((*x.shape[: self.first], *x.shape[self.last + 1 :]))

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return inputs[0].mean(tuple(range(self.first + 1, self.last + 2)))

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,) = inputs
        outer, along = math.prod(x.shape[: self.first]), math.prod(x.shape[self.first : self.last + 1])
        return [(_native.mean, (x.address, output.address, outer, along, x.numbers // (outer * along)))]
