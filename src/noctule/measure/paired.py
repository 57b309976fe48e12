"""Paired comparisons: the mean difference and its confidence interval."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for a two-sided 95 % interval of the mean of so many pairs."""


def interval(pairs: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """The mean difference of pairs of accuracies in points, with its 95 % interval where there are enough of them.

    >>> found = interval([(0.91, 0.90), (0.92, 0.90), (0.93, 0.90)])
    >>> round(found["difference_points"], 6), [round(x, 2) for x in found["interval_points"]]
    (2.0, [-0.48, 4.48])
    """
    points = [100 * (a - b) for a, b in pairs]
    mean = statistics.fmean(points)
    half = T_95[len(points)] * statistics.stdev(points) / math.sqrt(len(points)) if len(points) in T_95 else None
    return {
        "difference_points": mean,
        "interval_points": None if half is None else [mean - half, mean + half],
        "pairs": len(points),
    }
