"""Handlers for signals that ask a process to end (Ctrl-C, ``kill``, a job's time limit): between two steps, never inside one."""

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
"""Time within which a repeated signal counts as the same one: ``timeout`` and some terminals signal a process and its group."""


class Stopped(KeyboardInterrupt):
    """Exception for a signal that asks the process to end; `status` is the shell's: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.status = signum, 128 + signum


@dataclass(frozen=True)
class _Handler:
    """Signal handler of the process that installed it; in a forked process signals have their default effect."""

    react: Callable[[int], None]
    raises: bool = False
    """Whether the first signal raises `Stopped` and a second one ends the process."""
    process: int = field(default_factory=os.getpid)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            self.react(signum)
        else:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within the block, raise `Stopped` for a signal that asks the process to end; a second one ends the process at once."""
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
    """Within the block, end the process at once and silently at such a signal: there is nothing to save yet."""
    with handling(lambda signum: os._exit(128 + signum)):
        yield


@contextmanager
def default_signals() -> Iterator[None]:
    """Within the block, give such signals their default effect: the process ends wherever it is."""
    with handling(signal.SIG_DFL):
        yield


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block, hold back the first such signal: the yielded function then returns True. A second one acts at once.

    At the end of the block the signal goes to the handler that was there before. The caller's own handler for SIGTERM or SIGHUP
    stays in place. Outside the main thread, where Python delivers no signals, the function always returns False.
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
    """Within the block, install a handler for such signals and yield those it replaces; no change outside the main thread.

    A signal that is ignored, as SIGHUP is under ``nohup``, stays so, but for Ctrl-C.

    Args:
        react: a function of the signal's number, or one of the system's handlers.
        raises: whether ``react`` raises `Stopped`.
        replace: decides whether a handler of SIGTERM or SIGHUP other than the default one is replaced.
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
    """Call the handler that the signal had before; an ignored signal has none."""
    if _raises(handler):
        raise Stopped(signum)
    if callable(handler):
        handler(signum, None)
    elif handler is signal.SIG_DFL:
        signal.raise_signal(signum)
