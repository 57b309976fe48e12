"""L-BFGS on vectors that lie in slices on shards, of which only scalars come together; who evaluates the loss is left open.

Nocedal 1980, "Updating quasi-Newton matrices with limited storage", Mathematics of Computation 35; the line search is that of
Nocedal and Wright 2006, "Numerical optimization", section 3.5. Step for step it is `torch.optim.LBFGS`.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

_DECREASE, _FLATTER = 1e-4, 0.9
"""A step has to gain this share of what the slope promises, and to leave at most this share of the slope."""
_CURVED = 1e-10
"""A step along which the gradient changes less says nothing of the curvature."""


class Vector:
    """A handle on the slices of a vector: every operation is one command to all shards, and what comes back is a number.

    Args:
        slices: one for each shard.
        each: runs a function on the slices of all shards, as `map` does or the `map` of an executor.

    >>> a = Vector.cut(torch.tensor([1.0, 2.0, 3.0]), 2)
    >>> a.plus_(a, 2.0).dot(a)
    126.0
    """

    def __init__(self, slices: Sequence[Tensor], each: Callable[..., Any] = map) -> None:
        """Nothing is copied."""
        self.slices, self._each = list(slices), each

    @classmethod
    def cut(cls, x: Tensor, shards: int, each: Callable[..., Any] = map) -> Self:
        """The slices of a flat tensor, which keep its memory."""
        return cls(x.tensor_split(shards), each)

    def whole(self) -> Tensor:
        """The flat tensor, copied."""
        return torch.cat(self.slices)

    def copy(self) -> "Vector":
        """Another one with the same numbers."""
        return Vector(list(self._each(torch.clone, self.slices)), self._each)

    def times_(self, scale: float) -> Self:
        """Multiply in place."""
        list(self._each(lambda x: x.mul_(scale), self.slices))
        return self

    def plus_(self, other: "Vector", scale: float = 1.0) -> Self:
        """Add a multiple of another one in place."""
        list(self._each(lambda x, y: x.add_(y, alpha=scale), self.slices, other.slices))
        return self

    def dot(self, other: "Vector") -> float:
        """The inner product."""
        return self._sum(torch.dot, other)

    def size(self) -> float:
        """The sum of the absolute values."""
        return self._sum(lambda x: x.abs().sum())

    def largest(self) -> float:
        """The largest absolute value."""
        return max(float(x) for x in self._each(lambda x: x.abs().amax() if len(x) else x.sum(), self.slices))

    def finite(self) -> bool:
        """Whether every number is."""
        return all(self._each(lambda x: bool(x.isfinite().all()), self.slices))

    def _sum(self, part: Callable[..., Tensor], *others: "Vector") -> float:
        return sum(float(x) for x in self._each(part, self.slices, *(other.slices for other in others)))


class OrderedSum:
    """Vectors added up in one fixed tree, in whatever order they come: always the same bits, and few are kept meanwhile.

    >>> total = OrderedSum(3)
    >>> for place in (2, 0, 1):
    ...     total.add(place, Vector([torch.tensor([10.0**place])]))
    >>> total.total.whole()
    tensor([111.])
    """

    def __init__(self, count: int) -> None:
        """Of so many vectors."""
        self._count, self._halves = count, {}
        self.total: Vector | None = None

    def add(self, place: int, vector: Vector) -> None:
        """The vector of a place, each once; it is kept and changed."""
        level, width = 0, self._count
        while width > 1:
            if (twin := place ^ 1) < width:  # a last one without a twin goes up alone
                half = self._halves.pop((level, twin), None)
                if half is None:
                    self._halves[level, place] = vector
                    return
                vector = half.plus_(vector)
            place, width, level = place // 2, (width + 1) // 2, level + 1
        self.total = vector


@dataclass(frozen=True)
class LBFGS:
    """What `torch.optim.LBFGS` is told, by the same names where it has them.

    Args:
        lr: the length of a step, of the quasi-Newton one; where a line search begins.
        max_iter: directions in one step of the optimizer.
        max_eval: evaluations of the loss in it; None for a quarter more than `max_iter`.
        tolerance_grad: a step ends where no number of the gradient is larger.
        tolerance_change: or where the loss or the weights change less.
        history_size: how many changes of weights and gradient the curvature is taken from.
        strong_wolfe: search along a direction, or go `lr` times its length.
    """

    lr: float = 1.0
    max_iter: int = 20
    max_eval: int | None = None
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    history_size: int = 10
    strong_wolfe: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.lr <= 0 or self.tolerance_grad < 0 or self.tolerance_change < 0:
            raise ValueError(f"a step is longer than 0 and a tolerance is not below it, got {self}")
        if self.max_iter < 1 or self.history_size < 1 or (self.max_eval is not None and self.max_eval < 1):
            raise ValueError(f"iterations, evaluations and the history are at least 1, got {self}")


class Minimiser:
    """Goes from point to point, and keeps between steps what it knows of the curvature.

    Args:
        x: where it begins; it is moved in place.
        options: see there.
    """

    def __init__(self, x: Vector, options: LBFGS) -> None:
        """Without any history."""
        self.x, self.options = x, options
        self._history: list[tuple[Vector, Vector, float]] = []  # change of weights, of gradient, 1 / their product
        self._scale, self._length = 1.0, 0.0
        self._direction: Vector | None = None
        self._gradient: Vector | None = None  # where that direction began

    def step(self) -> Generator[Vector, tuple[float, Vector], float]:
        """One step of the optimizer: yields points, is sent loss and gradient there, and returns the loss it began at."""
        o = self.options
        most = o.max_iter * 5 // 4 if o.max_eval is None else o.max_eval
        loss, gradient = yield self.x
        first, evaluations = loss, 1
        for iteration in range(1, o.max_iter + 1):
            if gradient.largest() <= o.tolerance_grad:
                break
            length = o.lr if self._direction is not None else min(1.0, 1.0 / gradient.size()) * o.lr
            direction = self._turn(gradient)
            self._direction, self._gradient, self._length, before = direction, gradient, length, loss
            if (slope := gradient.dot(direction)) > -o.tolerance_change:
                break
            if o.strong_wolfe:
                start = _Trial(0.0, loss, gradient, slope)
                found, used = yield from _search(self.x, direction, start, length, most - evaluations, o)
                self.x.plus_(direction, found.length)
                self._length, loss, gradient = found.length, found.loss, found.gradient
                evaluations += used
            else:
                self.x.plus_(direction, length)
                if iteration < o.max_iter:  # the next step begins with it
                    loss, gradient = yield self.x
                    evaluations += 1
            if evaluations >= most or abs(loss - before) < o.tolerance_change:
                break
            if direction.largest() * self._length <= o.tolerance_change:
                break
        return first

    def _turn(self, gradient: Vector) -> Vector:
        """The next direction: minus the gradient times what is known of the inverse Hessian, by the two-loop recursion."""
        q = gradient.copy().times_(-1.0)
        if self._direction is None or self._gradient is None:
            return q
        s, y = self._direction.copy().times_(self._length), gradient.copy().plus_(self._gradient, -1.0)
        if (product := y.dot(s)) > _CURVED:
            self._history = [*self._history, (s, y, 1.0 / product)][-self.options.history_size :]
            self._scale = product / y.dot(y)
        shares = []
        for s, y, rho in reversed(self._history):
            shares.append(s.dot(q) * rho)
            q.plus_(y, -shares[-1])
        q.times_(self._scale)
        for (s, y, rho), share in zip(self._history, reversed(shares), strict=True):
            q.plus_(s, share - y.dot(q) * rho)
        return q

    def state_dict(self) -> dict[str, Any]:
        """Everything between two steps, as plain data."""
        return {
            "x": self.x.whole(),
            "history": [[s.whole(), y.whole(), rho] for s, y, rho in self._history],
            "scale": self._scale,
            "length": self._length,
            "direction": self._direction and self._direction.whole(),
            "gradient": self._gradient and self._gradient.whole(),
        }

    def load_state_dict(self, state: Mapping[str, Any], cut: Callable[[Tensor], Vector]) -> None:
        """Take back what `state_dict` gave, cut in slices."""
        self.x = cut(state["x"])
        self._history = [(cut(s), cut(y), rho) for s, y, rho in state["history"]]
        self._scale, self._length = state["scale"], state["length"]
        self._direction = None if state["direction"] is None else cut(state["direction"])
        self._gradient = None if state["gradient"] is None else cut(state["gradient"])


class _Trial(NamedTuple):
    """A point on a line."""

    length: float
    loss: float
    gradient: Vector
    slope: float


def _search(
    x: Vector, d: Vector, start: _Trial, length: float, most: int, options: LBFGS
) -> Generator[Vector, tuple[float, Vector], tuple[_Trial, int]]:
    """A point on the line from ``x`` along ``d`` that fulfils the strong Wolfe conditions, and how many were tried."""

    def at(length: float) -> Generator[Vector, tuple[float, Vector], _Trial]:
        loss, gradient = yield x.copy().plus_(d, length)
        return _Trial(length, loss, gradient, gradient.dot(d))

    def too_high(trial: _Trial) -> bool:
        return trial.loss > start.loss + _DECREASE * trial.length * start.slope

    def flat(trial: _Trial) -> bool:
        return abs(trial.slope) <= -_FLATTER * start.slope

    last, trial, tried, done = start, (yield from at(length)), 0, False
    while tried < most:  # go on until there is a good point between two
        if too_high(trial) or (tried > 1 and trial.loss >= last.loss):
            break
        if done := flat(trial):
            last = trial
            break
        if trial.slope >= 0:
            break
        shortest, longest = trial.length + 0.01 * (trial.length - last.length), trial.length * 10
        last, trial = trial, (yield from at(_lowest(last, trial, shortest, longest)))
        tried += 1
    else:
        last = start
    low, high = (last, trial) if last.loss <= trial.loss else (trial, last)
    widest, stalled = d.largest(), False
    while not done and tried < most and abs(high.length - low.length) * widest > options.tolerance_change:
        near, far = sorted((low.length, high.length))
        length, margin = _lowest(low, high, near, far), 0.1 * (far - near)
        beside = min(far - length, length - near) < margin
        if beside and (stalled or not near < length < far):
            length, beside = (far - margin if abs(length - far) < abs(length - near) else near + margin), False
        stalled = beside
        trial = yield from at(length)
        tried += 1
        if too_high(trial) or trial.loss >= low.loss:
            low, high = (low, trial) if low.loss <= trial.loss else (trial, low)
            continue
        done = flat(trial)
        if not done and trial.slope * (high.length - low.length) >= 0:
            high = low
        low = trial
    return low, tried + 1


def _lowest(a: _Trial, b: _Trial, shortest: float, longest: float) -> float:
    """Where the cubic through two points with their slopes is lowest, within bounds; halfway where it has no lowest point."""
    if a.length > b.length:
        a, b = b, a
    bend = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.length - b.length)
    root = bend * bend - a.slope * b.slope
    if root < 0 or (below := b.slope - a.slope + 2 * math.sqrt(root)) == 0:
        return (shortest + longest) / 2
    lowest = b.length - (b.length - a.length) * ((b.slope + math.sqrt(root) - bend) / below)
    return min(max(lowest, shortest), longest)
