"""The numbers along an axis, and a line thinned to what an axis can show."""

import itertools
import math
from collections.abc import Sequence

Point = tuple[float, float | None]
"""x and y; y is None where nothing was measured."""


def ticks(low: float, high: float, *, most: int = 6, whole: bool = False) -> list[float]:
    """At most `most` evenly spaced round numbers that reach from `low` or below to `high` or above.

    `whole` allows integers only. ValueError unless low <= high and both are within 1e100 of zero.

    >>> ticks(0.713, 0.888)
    [0.7, 0.75, 0.8, 0.85, 0.9]
    """
    if not -1e100 <= low <= high <= 1e100:
        raise ValueError(f"An axis cannot reach from {low} to {high}.")
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-90):
        pad = max(0.05 * abs(low), 1.0 if whole else 0.0) if abs(low) > 1e-80 else 1.0
        low, high = low - pad, high + pad
    power = math.floor(math.log10((high - low) / most))
    for exponent in itertools.count(max(power, 0) if whole else power):
        for mantissa in (1, 2, 5):
            over, under = (mantissa * 10**exponent, 1) if exponent >= 0 else (mantissa, 10**-exponent)
            first = math.floor(low * under / over + 1e-9)
            last = max(first + 1, math.ceil(high * under / over - 1e-9))
            if last - first < most:
                return [index * over / under for index in range(first, last + 1)]
    raise AssertionError("unreachable: steps grow without end")


def labels(values: Sequence[float]) -> list[str]:
    """A short text for each of evenly spaced, increasing `values`, all different: 0.25, 40k, 1.5M."""
    largest = max(abs(value) for value in values)
    step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    unit, suffix = next(((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if largest >= u), (1.0, ""))
    unit = 1e3 if suffix == "k" else unit
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    if decimals <= 4 and largest / unit < 1e5:
        return [f"{value / unit:,.{decimals}f}{suffix}" if value else "0" for value in values]
    for precision in range(1, 18):
        texts = [f"{value:.{precision}g}" for value in values]
        if all(abs(float(text) - value) < step / 100 for text, value in zip(texts, values, strict=True)):
            break
    return texts


def thin(points: Sequence[Point], most: int = 300) -> list[Point]:
    """At most `most` of `points`, in order: the first, the last, and the lowest and highest of each stretch between."""
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    stretches = (most - 2) // 2
    kept = [points[0]]
    for index in range(stretches):
        stretch = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        known = [(y, place) for place, (_, y) in enumerate(stretch) if y is not None]
        ends = {min(known)[1], max(known)[1]} if known else {0}  # where all are gaps, a gap stays
        kept.extend(stretch[place] for place in sorted(ends))
    return [*kept, points[-1]]
