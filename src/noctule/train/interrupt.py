"""Signals that ask a process to end (Ctrl-C, ``kill``, a job's time limit): heeded between two steps, never inside one."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ECHO_SECONDS = 0.2
"""``timeout`` and some terminals send a signal to a process and to its group: what comes so soon is no second one."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; `status` is the exit status that shells give it, 130 for Ctrl-C and 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        """Of the signal with this number."""
        super().__init__(signal.Signals(signum).name)
        self.signum, self.status = signum, 128 + signum


@dataclass(frozen=True)
class _Handler:
    """Reacts to signals in the process that installed it; one that was forked from it ends by them, as if there were none."""

    react: Callable[[int], None]
    raises: bool = False
    """Whether a signal raises `Stopped`, and a second one ends the process."""
    process: int = field(default_factory=os.getpid)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            self.react(signum)
        else:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within the block a signal that asks the process to end raises `Stopped`; a second one ends the process at once."""
    since: float | None = None

    def stop(signum: int) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            raise Stopped(signum)
        if time.monotonic() - since >= _ECHO_SECONDS:
            os._exit(128 + signum)

    with handling(stop, raises=True):
        yield


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block such a signal ends the process at once and without a word: there is nothing to keep yet."""
    with handling(lambda signum: os._exit(128 + signum)):
        yield


@contextmanager
def default_signals() -> Iterator[None]:
    """Within the block such signals do what they do in any process: end it, wherever it is."""
    with handling(signal.SIG_DFL):
        yield


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block the first such signal only makes the yielded function say True; a second one is not held back.

    What was held back is delivered when the block ends, to whatever handled it before. A handler of the caller's own for SIGTERM or
    SIGHUP stays in its place. Outside the main thread, where Python delivers no signals, the function always says False.
    """
    held: list[int] = []
    since = 0.0

    def hold(signum: int) -> None:
        nonlocal since
        if not held:
            held.append(signum)
            since = time.monotonic()
        elif time.monotonic() - since >= _ECHO_SECONDS:
            if _raises(before[signum]):
                os._exit(128 + signum)
            held.clear()
            signal.signal(signum, before[signum])
            _deliver(signum, before[signum])
            raise KeyboardInterrupt

    try:
        with handling(hold, replace=_raises) as before:
            yield lambda: bool(held)
    finally:
        if held:
            _deliver(held[0], before[held[0]])


@contextmanager
def handling(
    react: Callable[[int], None] | signal.Handlers, *, raises: bool = False, replace: Callable[[Any], bool] = callable
) -> Iterator[dict[int, Any]]:
    """React to such signals within the block, and yield what handled them before; nothing changes outside the main thread.

    A signal that is ignored, as SIGHUP is under ``nohup``, stays so, but for Ctrl-C.

    Args:
        react: is given the signal's number; or a handler of the system's.
        raises: whether it raises `Stopped`.
        replace: whether a handler of SIGTERM or SIGHUP, other than the default one, gives way to it.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        yield before
        return
    handler = react if isinstance(react, signal.Handlers) else _Handler(react, raises)
    try:
        for signum in SIGNALS:
            found = signal.getsignal(signum)
            if found is not None and (signum == signal.SIGINT or found is signal.SIG_DFL or replace(found)):
                before[signum] = found
                signal.signal(signum, handler)
        yield before
    finally:
        for signum, found in before.items():
            signal.signal(signum, found)


def _raises(handler: Any) -> bool:
    return isinstance(handler, _Handler) and handler.raises


def _deliver(signum: int, handler: Any) -> None:
    """To what handled the signal before; where it was ignored, to nobody."""
    if _raises(handler):
        raise Stopped(signum)
    if callable(handler):
        handler(signum, None)
    elif handler is signal.SIG_DFL:
        signal.raise_signal(signum)
