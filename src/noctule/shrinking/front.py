"""What is asked of a candidate, which candidates meet it, and which of those is chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from noctule.core.errors import UsageError
from noctule.core.place import nearest as near

WHAT = {"bytes": "bytes", "latency_ms": "latency_ms", "latency": "latency_ms", "accuracy": "accuracy"}
"""A word of the command line -> what is measured."""


class Point(Protocol):
    """What is measured of a file."""

    @property
    def bytes(self) -> int:
        """Of the file."""
        ...

    @property
    def latency_ms(self) -> float:
        """Of a call with one sample."""
        ...

    @property
    def accuracy(self) -> float:
        """On the validation part."""
        ...


P = TypeVar("P", bound=Point)


@dataclass(frozen=True)
class Bound:
    """A bound on bytes, milliseconds or accuracy: a number, or how many times smaller than the source.

    >>> Bound.read("bytes=10x")
    Bound(what='bytes', value=10.0, times=True)
    """

    what: str
    value: float
    times: bool = False

    @staticmethod
    def read(text: str) -> "Bound":
        """The bound that a text such as ``bytes=40000``, ``latency=3x`` or ``accuracy=0.9`` names.

        Raises:
            UsageError: it names none.
        """
        word, _, number = text.partition("=")
        if word not in WHAT:
            raise UsageError(
                f"there is no target {text!r}{near(word, list(WHAT))}: say bytes=10x, bytes=40000, latency=3x, "
                "latency_ms=0.5 or accuracy=0.9"
            )
        times = number.endswith("x")
        try:
            value = float(number.removesuffix("x"))
        except ValueError:
            value = math.nan
        fits = {"latency": times, "latency_ms": not times, "accuracy": not times and value <= 1.0}.get(word, True)
        if not (0.0 < value < math.inf and fits):
            forms = {"bytes": "bytes=10x or bytes=40000", "latency": "latency=3x", "latency_ms": "latency_ms=0.5"}
            raise UsageError(f"the target {text!r} is none: say {forms.get(word, 'accuracy=0.9, a share of 1')}")
        return Bound(WHAT[word], value, times)

    def limit(self, source: Point) -> float:
        """The bound as a number."""
        return getattr(source, self.what) / self.value if self.times else self.value

    def excess(self, point: Point, source: Point) -> float:
        """By how much a candidate misses the bound, as a logarithm; 0 where it meets it."""
        own, limit = max(getattr(point, self.what), 1e-12), self.limit(source)
        return max(0.0, math.log(limit / own) if self.what == "accuracy" else math.log(own / limit))


def front(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """The numbers of the points than which no other is at least as low in all costs and lower in one.

    >>> front([(1.0, 3.0), (2.0, 2.0), (2.0, 3.0)])
    [0, 1]
    """

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in costs)

    return [at for at, mine in enumerate(costs) if not beaten(mine)]


def choose(points: Sequence[P], bounds: Sequence[Bound], source: Point, *, within: float) -> P | None:
    """Of those that meet all bounds the smallest within so many points of the source's accuracy, else the most accurate."""
    met = [point for point in points if not any(bound.excess(point, source) for bound in bounds)]
    close = [point for point in met if point.accuracy >= source.accuracy - within / 100 - 1e-9]
    if close:
        return min(close, key=lambda point: (point.bytes, -point.accuracy))
    return max(met, key=lambda point: (point.accuracy, -point.bytes), default=None)


def nearest(points: Sequence[P], bounds: Sequence[Bound], source: Point, *, many: int = 3) -> list[P]:
    """The candidates that miss the bounds by the least, the nearest first."""
    return sorted(points, key=lambda point: sum(bound.excess(point, source) for bound in bounds))[:many]
