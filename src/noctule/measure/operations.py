"""Count the multiply-adds that kernels execute, at almost no cost while nothing listens."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Counter:
    """The number of multiply-adds executed, in all threads, while the counter listened."""

    def __init__(self) -> None:
        self.multiply_adds = 0


_listeners: list[Counter] = []
_lock = threading.Lock()


def count(multiply_adds: int) -> None:
    """Add multiply-adds that a kernel executed to every listening counter, nested ones and those of other threads included."""
    if _listeners:
        with _lock:
            for counter in _listeners:
                counter.multiply_adds += multiply_adds


@contextmanager
def listening() -> Iterator[Counter]:
    """Count the multiply-adds that kernels report while the block runs.

    >>> with listening() as counter:
    ...     count(1000)
    >>> counter.multiply_adds
    1000
    """
    counter = Counter()
    with _lock:
        _listeners.append(counter)
    try:
        yield counter
    finally:
        with _lock:
            _listeners.remove(counter)
