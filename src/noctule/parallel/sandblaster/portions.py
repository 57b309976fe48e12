"""The portions of a batch: which worker computes which, and their losses and gradients added up."""

import math
import statistics
from collections import deque
from typing import Any

from torch import Tensor

_LATE = 1.5
"""A portion that takes so many times the usual time is given to a second worker."""


class OrderedSum:
    """A sum of tensors in one fixed order, whatever order they arrive in: always the same bits.

    The order is a binary tree over the places, so that at most one partial sum a level is kept.

    >>> total = OrderedSum(3)
    >>> for place in (2, 0, 1):
    ...     total.add(place, torch.tensor([10.0**place]))
    >>> total.total
    tensor([111.])
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._partial: dict[tuple[int, int], Tensor] = {}
        self.total: Tensor | None = None

    def add(self, place: int, x: Tensor) -> None:
        """Add the tensor of a place, each place once; the tensor is kept and changed."""
        level, width = 0, self._count
        while width > 1:
            if (twin := place ^ 1) < width:  # a last one without a twin goes up alone
                half = self._partial.pop((level, twin), None)
                if half is None:
                    self._partial[level, place] = x
                    return
                x = half.add_(x)
            place, width, level = place // 2, (width + 1) // 2, level + 1
        self.total = x


class Portions:
    """One evaluation of the loss: hands out portions, late ones twice, and keeps the first result of each.

    Args:
        count: how many portions the batch has.
        seconds: how long portions took lately; results are added to it.

    >>> portions = Portions(2, deque([1.0]))
    >>> portions.take("a", 0.0), portions.take("b", 0.0), portions.take("c", 1.0), portions.take("c", 2.0)
    (0, 1, None, 0)
    """

    def __init__(self, count: int, seconds: deque[float]) -> None:
        self.count, self.seconds = count, seconds
        self._losses: dict[int, float] = {}
        self._sum = OrderedSum(count)
        self._next = 0
        self._out: dict[int, dict[Any, float]] = {}
        """For each portion without a result, the workers that compute it and since when, in the order they began."""

    def take(self, worker: Any, now: float) -> int | None:
        """A portion for a worker: the one that it has not returned, else a new one, else one that is late at another worker."""
        portion = next((p for p, copies in self._out.items() if worker in copies), None)
        if portion is None and self._next < self.count:
            portion, self._next = self._next, self._next + 1
        if portion is None:
            waits = {p: now - [*copies.values()][-1] for p, copies in self._out.items()}
            longest = max(waits, key=waits.__getitem__)
            if waits[longest] <= (_LATE * statistics.median(self.seconds) if self.seconds else 0.0):
                return None
            portion = longest
        copies = self._out.setdefault(portion, {})
        copies.pop(worker, None)
        copies[worker] = now
        return portion

    def put(self, worker: Any, portion: int, loss: float, gradient: Tensor, now: float) -> bool:
        """Keep a result; False if there was one of this portion before."""
        if portion not in self._out:
            return False
        since = self._out.pop(portion).get(worker)
        if since is not None:
            self.seconds.append(now - since)
        self._losses[portion] = loss
        self._sum.add(portion, gradient)
        return True

    @property
    def total(self) -> tuple[float, Tensor] | None:
        """The loss and gradient of the whole batch; None until every portion has a result."""
        return None if self._sum.total is None else (math.fsum(self._losses.values()), self._sum.total)
