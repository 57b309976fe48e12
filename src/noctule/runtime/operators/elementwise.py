"""What computes each number, or each line of numbers, by itself: sums, activations, norms, softmax, rounding to codes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from noctule.runtime import _native, integers
from noctule.runtime.operators.base import Buffer, Call, Operator, Plan, check, line
from noctule.runtime.values import Grid, Value

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1.0) / (1.0 + np.exp(-np.abs(x)))


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
    "hardswish": lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0,
}
"""In the order of the compiled code."""


@dataclass(frozen=True, eq=False)
class Activation(Operator):
    """A function of each number."""

    kind: Literal["gelu", "gelu_tanh", "sigmoid", "silu", "tanh", "hardswish"]

    def infer(self, *inputs: Value) -> Value:
        return inputs[0].floats()

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return ACTIVATIONS[self.kind](inputs[0].astype(np.float64)).astype(np.float32)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,) = inputs
        return [(_native.activate, ([*ACTIVATIONS].index(self.kind), x.address, output.address, x.numbers))]


@dataclass(frozen=True, eq=False)
class Clamp(Operator):
    """Two-slope activation, then limits: ReLU, LeakyReLU, ReLU6."""

    slope: float = 1.0
    low: float = -3e38
    high: float = 3e38

    def infer(self, *inputs: Value) -> Value:
        check(self.low <= self.high, f"{self.low} is above {self.high}")
        return inputs[0].floats()

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        (x,) = inputs
        return np.clip(np.where(x > 0, x, x * np.float32(self.slope)), self.low, self.high).astype(np.float32)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,) = inputs
        return [(_native.clamp, (x.address, output.address, x.numbers, self.slope, self.low, self.high))]


@dataclass(frozen=True, eq=False)
class Affine(Operator):
    """y = activation(x * scale + shift), with numbers of their own for the places along the first axes.

    Batch norms that are not folded, added positions, factors.

    Args:
        scale: one number for each of the first R places of a sample in reading order, R the product of its first sizes.
        shift: as many.
        slope: of the negative side.
    """

    scale: np.ndarray
    shift: np.ndarray
    slope: float = 1.0

    def infer(self, *inputs: Value) -> Value:
        x = inputs[0].floats()
        rows = len(self.scale) if self.scale.ndim == 1 else 0
        check(rows in np.cumprod((1, *x.shape)), f"{self.scale.shape} factors do not go with {x.shape}")
        line(self.scale, rows, "scale")
        line(self.shift, rows, "shift")
        return x

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        x = inputs[0].reshape(len(inputs[0]), len(self.scale), -1)
        y = x * self.scale[:, None] + self.shift[:, None]
        return np.where(y > 0, y, y * np.float32(self.slope)).astype(np.float32).reshape(inputs[0].shape)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,), rows = inputs, len(self.scale)
        scale, shift = plan.held((self, 0), lambda: self.scale), plan.held((self, 1), lambda: self.shift)
        return [(_native.affine, (x.address, output.address, rows, x.numbers // rows, scale, shift, self.slope))]


@dataclass(frozen=True, eq=False)
class Pointwise(Operator):
    """The sum or the product of two values of one shape, then a two-slope activation."""

    how: Literal["add", "multiply"]
    slope: float = 1.0

    def infer(self, *inputs: Value) -> Value:
        x, y = (value.floats() for value in inputs)
        check(x.shape == y.shape, f"{x.shape} and {y.shape} differ")
        return x

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        z = inputs[0] + inputs[1] if self.how == "add" else inputs[0] * inputs[1]
        return np.where(z > 0, z, z * np.float32(self.slope)).astype(np.float32)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        x, y = inputs
        function = _native.add if self.how == "add" else _native.multiply
        return [(function, (x.address, y.address, output.address, x.numbers, self.slope))]


@dataclass(frozen=True, eq=False)
class Softmax(Operator):
    """exp(x) over its sum along an axis; causal: what lies behind the diagonal of the last two axes counts as nothing."""

    axis: int
    causal: bool = False

    def infer(self, *inputs: Value) -> Value:
        x = inputs[0].floats()
        check(0 <= self.axis < len(x.shape), f"{x.shape} has no axis {self.axis}")
        check(not self.causal or self.axis == len(x.shape) - 1 > 0, "causal weights are those of the last of two axes")
        return x

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        (x,) = inputs
        if self.causal:
            x = np.where(np.tri(*x.shape[-2:], dtype=bool), x, -np.inf)
        e = np.exp(x - x.max(self.axis + 1, keepdims=True))
        return (e / e.sum(self.axis + 1, keepdims=True)).astype(np.float32)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,) = inputs
        period = x.shape[-2] if self.causal else 0
        return [(_native.softmax, (x.address, output.address, *x.around(self.axis), period))]


@dataclass(frozen=True, eq=False)
class LayerNorm(Operator):
    """Each line along the last axis less its mean, over its standard deviation, times a weight, plus a bias."""

    weight: np.ndarray
    bias: np.ndarray
    epsilon: float = 1e-5

    def infer(self, *inputs: Value) -> Value:
        x = inputs[0].floats()
        check(len(x.shape) > 0 and self.epsilon > 0, "a norm needs an axis and an epsilon above 0")
        last = x.shape[len(x.shape) - 1]
        line(self.weight, last, "weight")
        line(self.bias, last, "bias")
        return x

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        x = inputs[0].astype(np.float64)
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.epsilon)
        return (y * self.weight + self.bias).astype(np.float32)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,) = inputs
        weight, bias = plan.held((self, 0), lambda: self.weight), plan.held((self, 1), lambda: self.bias)
        return [
            (_native.layer_norm, (x.address, output.address, *x.around(len(x.shape) - 1), weight, bias, self.epsilon))
        ]


@dataclass(frozen=True, eq=False)
class Quantize(Operator):
    """Activations rounded to codes on a grid."""

    to: Grid

    def infer(self, *inputs: Value) -> Value:
        return Value(inputs[0].floats().shape, "codes", self.to)

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return self.to.codes(inputs[0])

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,), to = inputs, self.to
        return [integers.quantize(x.address, x.numbers, float(to.inverse), to.zero_point, to.highest, output.address)]
