"""Repeated calls of a function from a background thread while a block runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(function: Callable[[], object], *, every_seconds: float) -> Iterator[None]:
    """Call `function` at once, then every so many seconds, and once more at the end, never twice at a time."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(every_seconds):
            function()

    function()
    thread = threading.Thread(target=loop, daemon=True, name="noctule-measure")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        function()
