"""Numbers that change with the step: plain functions, each returning a `Schedule` (step from 0 -> value)."""

import math
import operator
from collections.abc import Callable

from noctule.core.types import Schedule


def constant(value: float) -> Schedule:
    """The same value at every step."""
    value = _finite("value", value)

    def schedule(step: int) -> float:
        _at_least("step", step, 0)
        return value

    return schedule


def linear(start: float, *, end: float, steps: int) -> Schedule:
    """A straight line from `start` at step 0 to `end` at step `steps`, then `end`.

    >>> half = linear(1.0, end=0.0, steps=10)
    >>> half(0), half(5), half(10), half(99)
    (1.0, 0.5, 0.0, 0.0)
    """
    return _ramp(start, end, steps, lambda t: t)


def cosine(start: float, *, end: float, steps: int) -> Schedule:
    """Half a cosine wave from `start` to `end` over `steps`, flat at both ends, then `end`."""
    return _ramp(start, end, steps, lambda t: (1.0 - math.cos(math.pi * t)) / 2.0)


def cubic(start: float, *, end: float, steps: int) -> Schedule:
    """The pruning ramp of Zhu and Gupta (2017, arXiv 1710.01878): fast at first, flat at `end`, then `end`."""
    return _ramp(start, end, steps, lambda t: 1.0 - (1.0 - t) ** 3)


def exponential(start: float, *, end: float, steps: int) -> Schedule:
    """From `start` to `end`, both above 0, by the same factor at every one of `steps` steps, then `end`."""
    start, end, steps = _finite("start", start), _finite("end", end), _at_least("steps", steps, 1)
    if start <= 0.0 or end <= 0.0:
        raise ValueError(f"exponential needs start and end above 0, got {start} and {end}; use linear or cosine")
    low, high, ratio = min(start, end), max(start, end), math.log(end) - math.log(start)

    def schedule(step: int) -> float:
        t = _at_least("step", step, 0) / steps
        return end if t >= 1.0 else min(max(start * math.exp(ratio * t), low), high)

    return schedule


def step_decay(start: float, *, factor: float, every: int) -> Schedule:
    """`start`, multiplied by `factor` (in (0, 1]) after each `every` steps.

    >>> rate = step_decay(8.0, factor=0.5, every=10)
    >>> rate(9), rate(10), rate(35)
    (8.0, 4.0, 1.0)
    """
    start, factor, every = _finite("start", start), _finite("factor", factor), _at_least("every", every, 1)
    if not 0.0 < factor <= 1.0:
        raise ValueError(f"step_decay needs a factor in (0, 1], got {factor}")

    def schedule(step: int) -> float:
        return start * factor ** (_at_least("step", step, 0) // every)

    return schedule


def warmup(schedule: Schedule, *, steps: int) -> Schedule:
    """A straight line from 0 at step 0 to `schedule(0)` at step `steps`, then `schedule` from its start."""
    steps, first = _at_least("steps", steps, 1), _finite("schedule(0)", schedule(0))

    def warmed(step: int) -> float:
        return first * (step / steps) if _at_least("step", step, 0) < steps else schedule(step - steps)

    return warmed


def _ramp(start: float, end: float, steps: int, shape: Callable[[float], float]) -> Schedule:
    """From `start` to `end` along `shape`, a rising function of [0, 1] onto itself."""
    start, end, steps = _finite("start", start), _finite("end", end), _at_least("steps", steps, 1)
    low, high, span = min(start, end), max(start, end), _finite("end - start", end - start)

    def schedule(step: int) -> float:
        t = _at_least("step", step, 0) / steps
        return end if t >= 1.0 else min(max(start + span * shape(t), low), high)  # rounding may not leave the range

    return schedule


def _finite(name: str, value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


def _at_least(name: str, value: int, least: int) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if whole < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return whole
