"""The density at which two implementations take the same time."""

import math
from collections.abc import Mapping


def break_even(speedups: Mapping[float, float]) -> tuple[float | None, str]:
    """The density up to which sparse beats dense, from speed-ups at several densities, and how that is known.

    Between two densities the speed-up is taken as a power of the density. None: dense wins everywhere.

    >>> break_even({0.01: 16.0, 0.04: 4.0, 0.64: 0.25})
    (0.16, 'interpolated')
    >>> break_even({0.01: 16.0, 0.04: 4.0})
    (0.04, 'sparse is faster at every density measured')
    """
    points = sorted(speedups.items())
    if not points or points[0][1] <= 1.0:
        return None, "dense is faster at every density measured"
    for (low, fast), (high, slow) in zip(points, points[1:]):
        if slow <= 1.0:
            share = math.log(fast) / math.log(fast / slow)
            return round(low * (high / low) ** share, 6), "interpolated"
    return points[-1][0], "sparse is faster at every density measured"
