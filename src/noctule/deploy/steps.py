"""The steps of a graph while a model is read: values with the axis of their batch, and adding steps to it."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from noctule.runtime.graph import Step
from noctule.runtime.operators import Affine, Constant, Operator, Permute, Quantize, Reshape
from noctule.runtime.values import Grid, Value


@dataclass(frozen=True)
class Ref:
    """A value of the graph, and which axis of torch's tensor its batch is."""

    number: int
    batch: int


@dataclass
class Steps:
    """The steps so far."""

    layers: dict[str, nn.Module]
    input: Value
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(init=False)
    name: str = ""
    """Of the module that is read."""
    node: Node | None = None
    """Of torch's graph that is read."""

    def __post_init__(self) -> None:
        self.values = [self.input]

    def add(self, operator: Operator, *of: Ref, batch: int | None = None) -> Ref:
        """Add a step; its value has the batch where the first of those that it reads has it, unless said otherwise."""
        self.steps.append(Step(self.name, tuple(x.number for x in of), operator))
        self.values.append(operator.infer(*(self.values[x.number] for x in of)))
        return Ref(len(self.steps), of[0].batch if batch is None else batch)

    def shape(self, x: Ref) -> tuple[int, ...]:
        """Of one sample."""
        return self.values[x.number].shape

    def axis(self, x: Ref, axis: int) -> int:
        """The axis of a sample that an axis of torch's tensor is; raises ValueError where that is the batch."""
        rank = len(self.shape(x)) + 1
        axis = axis + rank if axis < 0 else axis
        if axis == x.batch or not 0 <= axis < rank:
            raise ValueError(f"it works along axis {axis}, which is the batch")
        return axis - (axis > x.batch)

    def reshape(self, x: Ref) -> Ref:
        """A value in the shape of the node that is read: the batch must stay an axis of its own."""
        assert self.node is not None
        whole = self.node.meta["val"].shape
        batches = [k for k, n in enumerate(whole) if isinstance(n, torch.SymInt)]
        shape = tuple(int(n) for k, n in enumerate(whole) if k not in batches)
        before = math.prod(self.shape(x)[: x.batch])
        alone = len(batches) == 1 and math.prod(shape) == self.values[x.number].numbers
        if not alone or math.prod(whole[: batches[0]]) != before:
            raise ValueError(f"it merges the batch with other axes, or fixes its size: {[*map(str, whole)]}")
        if shape == self.shape(x):
            return Ref(x.number, batches[0])
        return self.add(Reshape(shape), x, batch=batches[0])

    def permute(self, x: Ref, order: list[int]) -> Ref:
        """The axes of torch's tensor in another order; where only the batch moves, no number does."""
        batch = order.index(x.batch)
        axes = tuple(self.axis(x, a) for a in order if a != x.batch)
        if axes == tuple(range(len(axes))):
            return Ref(x.number, batch)
        return self.add(Permute(axes), x, batch=batch)

    def affine(self, x: Ref, scale: Tensor | float, shift: Tensor | float, slope: float = 1.0) -> Ref:
        """x * scale + shift, of numbers that do not depend on the sample."""
        whole = [*self.shape(x)]
        whole.insert(x.batch, 1)

        def full(numbers: Tensor | float) -> np.ndarray:
            each = torch.as_tensor(numbers, dtype=torch.float32).broadcast_to(whole).squeeze(x.batch)
            return np.ascontiguousarray(each.numpy())

        a, b = full(scale), full(shift)
        rows = 1
        for size in a.shape:  # as few factors as say the same
            parts = [n.reshape(rows, -1) for n in (a, b)]
            if all((n == n[:, :1]).all() for n in parts):
                break
            rows *= size
        a, b = (np.ascontiguousarray(n.reshape(rows, -1)[:, 0]) for n in (a, b))
        return self.add(Affine(a, b, slope), x)

    def constant(self, numbers: Tensor, like: Ref) -> Ref:
        """Numbers (with a batch of 1) that are the same for each sample, as a value."""
        each = numbers.float().squeeze(like.batch).contiguous().numpy()
        return self.add(Constant(each), like)

    def codes(self, x: Ref, grid: Grid) -> Ref:
        """A value rounded to a grid; one that has been rounded to it already is not rounded again."""
        for number, step in enumerate(self.steps, start=1):
            if step.of == (x.number,) and isinstance(step.operator, Quantize) and step.operator.to == grid:
                return Ref(number, x.batch)
        return self.add(Quantize(grid), x)


def tensor(x: Any) -> Tensor:
    """A constant; raises ValueError for a value that depends on the sample."""
    if isinstance(x, Ref):
        raise ValueError("it takes as a weight what depends on the input")
    return x
