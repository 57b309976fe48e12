"""Time functions against each other, interleaved, so that whatever else the machine does hits all of them alike."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """How long each call of a function took."""

    samples: tuple[float, ...]
    """Seconds, in the order of the rounds."""

    @property
    def median_seconds(self) -> float:
        """The middle of the samples."""
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        """The fastest sample, seconds."""
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The samples, seconds, below which a quarter and three quarters of all lie."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def as_dict(self) -> dict[str, Any]:
        """A summary as plain JSON, without the samples."""
        return {
            "median_seconds": self.median_seconds,
            "minimum_seconds": self.minimum,
            "quartiles_seconds": list(self.quartiles),
            "rounds": len(self.samples),
        }


@dataclass(frozen=True)
class Ratio:
    """How many times as long one function takes as another."""

    value: float
    """The median of the ratios of the rounds."""
    low: float
    high: float
    coverage: float
    """How surely the true median lies from `low` to `high`: at least 0.95 from six rounds on."""

    def as_dict(self) -> dict[str, float]:
        """The numbers as plain JSON."""
        return {"ratio": self.value, "low": self.low, "high": self.high, "coverage": self.coverage}

    def __str__(self) -> str:
        """Like "3.21 [3.10, 3.30]"."""
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interleave(functions: dict[str, Callable[[], Any]], *, rounds: int = 20, warmup: int = 3) -> dict[str, Timing]:
    """Call functions in turn, A B C A B C ..., and time each call.

    The first `warmup` rounds are not timed. Garbage is collected before the timing and not during it. A function that
    starts work elsewhere (CUDA) has to wait for it itself.

    >>> timings = interleave({"sum": lambda: sum(range(100)), "nothing": lambda: None}, rounds=7)
    >>> bool(ratio(timings["sum"], timings["nothing"]).value > 1)
    True
    """
    if rounds < 1 or warmup < 0 or not functions:
        raise ValueError(f"nothing to time: rounds={rounds}, warmup={warmup}, functions={list(functions)}")
    for _ in range(warmup):
        for function in functions.values():
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter_ns()
                function()
                samples[name].append((time.perf_counter_ns() - start) / 1e9)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """How many times as long `a` takes as `b`, from the ratios within each round, so that drift cancels out.

    The interval is made of two of the ratios themselves, chosen by the binomial distribution: it needs no assumption
    about how times scatter.
    """
    if len(a.samples) != len(b.samples):
        raise ValueError(f"timings of {len(a.samples)} and {len(b.samples)} rounds have no pairs: interleave them")
    ratios = sorted(x / max(y, 1e-9) for x, y in zip(a.samples, b.samples, strict=True))
    n = len(ratios)
    # the chance that the true median lies outside the interval that leaves out k ratios on either side, by k
    outside = [2 * below / 2**n for below in itertools.accumulate(math.comb(n, k) for k in range((n + 1) // 2))]
    k = max(sum(chance <= 0.05 for chance in outside) - 1, 0)
    return Ratio(statistics.median(ratios), ratios[k], ratios[n - 1 - k], coverage=1 - outside[k])
