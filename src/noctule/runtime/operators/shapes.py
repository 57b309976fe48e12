"""What moves numbers about, looks them up, or multiplies two values: views, permutations, parts, embeddings, matrix products."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from noctule.runtime import _native
from noctule.runtime.operators.base import Buffer, Call, Operator, Plan, check
from noctule.runtime.values import Value


@dataclass(frozen=True, eq=False)
class Reshape(Operator):
    """The same numbers in another shape; costs nothing."""

    shape: tuple[int, ...]

    def infer(self, *inputs: Value) -> Value:
        (x,) = inputs
        y = x.like(*self.shape)
        check(y.numbers == x.numbers, f"{x.shape} has {x.numbers} numbers, {self.shape} {y.numbers}")
        return y

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return inputs[0].reshape(len(inputs[0]), *self.shape)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        return []  # a plan gives both the same memory


@dataclass(frozen=True, eq=False)
class Permute(Operator):
    """The axes of a sample in another order."""

    axes: tuple[int, ...]

    def infer(self, *inputs: Value) -> Value:
        (x,) = inputs
        check(sorted(self.axes) == [*range(len(x.shape))], f"{self.axes} is no order of the axes of {x.shape}")
        return x.like(*(x.shape[a] for a in self.axes))

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return inputs[0].transpose(0, *(a + 1 for a in self.axes))

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,) = inputs
        steps = [x.around(a)[2] for a in self.axes]
        unused = 8 - len(self.axes)
        sizes = plan.held(
            (self, x.lanes), lambda: np.array([[1] * unused + [*output.shape], [0] * unused + steps], np.int64)
        )
        return [(_native.permute, (x.bytes_each, x.address, output.address, sizes, x.lanes))]


@dataclass(frozen=True, eq=False)
class Concat(Operator):
    """Values one after another along an axis."""

    axis: int

    def infer(self, *inputs: Value) -> Value:
        x, rest = inputs[0], inputs[1:]
        check(0 <= self.axis < len(x.shape), f"{x.shape} has no axis {self.axis}")

        def others(value: Value) -> tuple[int, ...]:
            return (*value.shape[: self.axis], *value.shape[self.axis + 1 :])

        for y in rest:
            same = len(y.shape) == len(x.shape) and others(x) == others(y) and (x.kind, x.grid) == (y.kind, y.grid)
            check(same, f"{x.shape} of {x.kind} and {y.shape} of {y.kind} do not go together along axis {self.axis}")
        return x.like(*x.shape[: self.axis], sum(v.shape[self.axis] for v in inputs), *x.shape[self.axis + 1 :])

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return np.concatenate(inputs, self.axis + 1)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        calls: list[Call] = []
        at, (outer, along, inner) = output.address, output.around(self.axis)
        for x in inputs:
            line = x.shape[self.axis] * inner * x.bytes_each
            calls.append((_native.copy_lines, (x.address, line, at, along * inner * x.bytes_each, outer, line)))
            at += line
        return calls


@dataclass(frozen=True, eq=False)
class Slice(Operator):
    """The places from ``start`` to ``stop`` (excluded) along an axis."""

    axis: int
    start: int
    stop: int

    def infer(self, *inputs: Value) -> Value:
        (x,) = inputs
        sound = 0 <= self.axis < len(x.shape) and 0 <= self.start < self.stop <= x.shape[self.axis]
        check(sound, f"{x.shape} has no places {self.start} to {self.stop} along axis {self.axis}")
        return x.like(*x.shape[: self.axis], self.stop - self.start, *x.shape[self.axis + 1 :])

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return inputs[0][(slice(None),) * (self.axis + 1) + (slice(self.start, self.stop),)]

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,) = inputs
        outer, along, inner = (n * k for n, k in zip(x.around(self.axis), (1, 1, x.bytes_each), strict=True))
        line = (self.stop - self.start) * inner
        return [
            (_native.copy_lines, (x.address + self.start * inner, along * inner, output.address, line, outer, line))
        ]


@dataclass(frozen=True, eq=False)
class Constant(Operator):
    """The same numbers for each sample: a class token. Reads a value for the size of the batch alone.

    Args:
        numbers: float32, of any shape.
    """

    numbers: np.ndarray

    def infer(self, *inputs: Value) -> Value:
        check(
            self.numbers.dtype == np.float32 and bool(np.isfinite(self.numbers).all()), "constants are finite float32"
        )
        return Value(self.numbers.shape)

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return np.broadcast_to(self.numbers, (len(inputs[0]), *self.numbers.shape))

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        numbers = plan.held((self, 0), lambda: self.numbers)
        return [(_native.spread, (numbers, output.address, output.value.numbers, output.lanes))]


@dataclass(frozen=True, eq=False)
class Embedding(Operator):
    """Rows of a table (V, D) by tokens (...): (..., D)."""

    table: np.ndarray

    def infer(self, *inputs: Value) -> Value:
        check(inputs[0].kind == "tokens", f"an embedding reads tokens, not {inputs[0].kind}")
        sound = self.table.dtype == np.float32 and self.table.ndim == 2 and bool(np.isfinite(self.table).all())
        check(sound, f"a table is finite float32 (V, D), got {self.table.dtype} {self.table.shape}")
        return Value((*inputs[0].shape, self.table.shape[1]))

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        return self.table[inputs[0]]

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        (x,) = inputs
        table = plan.held((self, 0), lambda: np.ascontiguousarray(self.table))
        return [(_native.embed, (x.address, output.address, x.value.numbers, x.lanes, table, *self.table.shape))]


@dataclass(frozen=True, eq=False)
class MatMul(Operator):
    """The products of two values' matrices, times a factor: (..., T, D) (..., D, S), or (..., T, D) (..., S, D) transposed."""

    transposed: bool = False
    factor: float = 1.0

    def infer(self, *inputs: Value) -> Value:
        x, y = (value.floats() for value in inputs)
        sound = len(x.shape) == len(y.shape) >= 2 and x.shape[:-2] == y.shape[:-2]
        check(sound, f"no matrices go together in {x.shape} and {y.shape}")
        deep, out = (y.shape[-1], y.shape[-2]) if self.transposed else y.shape[-2:]
        check(x.shape[-1] == deep, f"matrices of {x.shape} and {y.shape} cannot be multiplied")
        return Value((*x.shape[:-1], out))

    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        x, y = inputs
        return (x @ (y.swapaxes(-1, -2) if self.transposed else y) * np.float32(self.factor)).astype(np.float32)

    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        x, y = inputs
        sizes = (math.prod(x.shape[:-2]), *x.shape[-2:], output.shape[-1], x.lanes)
        return [(_native.matmul, (x.address, y.address, output.address, *sizes, self.transposed, self.factor))]
