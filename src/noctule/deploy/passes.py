"""The same graph in fewer steps: activations and rounding go into the step before them, and what nothing reads goes."""

from collections import Counter
from dataclasses import replace
from typing import Any

from noctule.runtime.graph import Graph, Step
from noctule.runtime.operators import Affine, Clamp, Conv2d, Linear, Permute, Pointwise, Pool, Quantize, Reshape, Slice
from noctule.runtime.values import Grid

UNLIMITED = Clamp()


def simplified(graph: Graph, output: int) -> Graph:
    """The graph up to this output."""
    steps = _live(list(graph.steps), output)
    while (changed := _fuse(steps)) is not None:
        steps = changed
    return Graph(graph.input, steps, graph.facts)


def _fuse(steps: list[Step]) -> list[Step] | None:
    """One change; None where there is none left. The output stays the last step."""
    readers = Counter(k for step in steps for k in step.of)
    readers[len(steps)] += 1
    for number, step in enumerate(steps, start=1):
        before = step.of[0]
        if before == 0 or len(step.of) > 1 or readers[before] > 1:
            continue
        first, second = steps[before - 1], step.operator
        made = _joined(first.operator, second)
        if made is not None:
            return _without(steps, number, Step(first.name, first.of, made))
        if isinstance(second, Quantize) and _only_moves(first.operator):
            swapped = [*steps]
            swapped[before - 1] = Step(step.name, first.of, second)
            swapped[number - 1] = Step(first.name, (before,), first.operator)
            return swapped
    return None


def _only_moves(operator: Any) -> bool:
    """Whether it picks and moves numbers only: rounding, which keeps their order, may come before."""
    return isinstance(operator, Permute | Reshape | Slice) or (isinstance(operator, Pool) and operator.how == "max")


def _joined(first: Any, second: Any) -> Any:
    """One operator for two, or None."""
    unlimited = isinstance(second, Clamp) and (second.low, second.high) == (UNLIMITED.low, UNLIMITED.high)
    if unlimited and isinstance(first, Linear | Conv2d | Affine | Pointwise) and first.slope == 1.0:
        return None if getattr(first, "to", None) else replace(first, slope=second.slope)
    if isinstance(second, Quantize) and isinstance(first, Clamp) and _within(second.to, first):
        return second
    if isinstance(second, Quantize) and isinstance(first, Linear | Conv2d) and first.weight.scales is not None:
        return None if first.to else replace(first, to=second.to)
    return None


def _within(grid: Grid, clamp: Clamp) -> bool:
    """Whether rounding to a grid cuts what lies outside of these limits anyway."""
    low = max(clamp.low, 0.0) if clamp.slope == 0.0 else clamp.low
    low_end, high_end = -grid.zero_point * grid.scale, (grid.highest - grid.zero_point) * grid.scale
    return clamp.slope in (0.0, 1.0) and low_end >= low and high_end <= clamp.high


def _without(steps: list[Step], number: int, joined: Step) -> list[Step]:
    """The steps with one taken into the one that it reads."""
    before = steps[number - 1].of[0]
    kept = [joined if k == before else step for k, step in enumerate(steps, start=1) if k != number]

    def now(k: int) -> int:
        return before if k == number else k - (k > number)

    return [Step(step.name, tuple(now(k) for k in step.of), step.operator) for step in kept]


def _live(steps: list[Step], output: int) -> list[Step]:
    """The steps that the output depends on, itself last."""
    live, numbers = {output}, {0: 0}
    for number in range(output, 0, -1):
        if number in live:
            live.update(steps[number - 1].of)
    kept = []
    for number in range(1, output + 1):
        if number in live:
            step = steps[number - 1]
            kept.append(Step(step.name, tuple(numbers[k] for k in step.of), step.operator))
            numbers[number] = len(kept)
    return kept
