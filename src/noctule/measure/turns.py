"""Processes that take turns: each library works in its own process, and only one process works at a time.

Two OpenMP runtimes in one process wait for each other in busy loops, and a library may bring its own. In its own process it
disturbs no other library and is timed as its users meet it.
"""

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from types import TracebackType
from typing import Any, Self

import torch

from noctule.core.errors import NoctuleError
from noctule.measure import Progress, Timing
from noctule.measure.allocator import keep_freed_memory

REST_SECONDS = 0.01
"""Before a turn: until the idle threads of the process before have stopped waiting in busy loops."""

WARM_SECONDS = 0.08
"""Of untimed calls at the start of a turn: after a rest the processor needs so long to come back to its pace and its caches."""

Step = Callable[[], object]


class Unavailable(NoctuleError):
    """Something cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Process:
    """A process to measure in: its name, and its environment variables."""

    name: str
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Turns:
    """How long the calls of a prepared step took."""

    timing: Timing
    """Seconds a call, one sample for each turn."""
    busy_cores: float
    """Seconds of CPU for each second on the clock (median): no more than the threads that were asked for."""
    calls: int
    """Calls in each turn."""


class Workers:
    """Processes with so many threads each, started when they are first needed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pools: dict[Process, ProcessPoolExecutor] = {}
        self._where: dict[str, Process] = {}

    def run(self, process: Process, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in one of the processes and return what it returns."""
        try:
            if process not in self._pools:
                with _environment({"OMP_NUM_THREADS": str(self.threads), **dict(process.environment)}):
                    pool = self._pools[process] = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
                    pool.submit(_start, self.threads).result()
            return self._pools[process].submit(function, *args).result()
        except BrokenExecutor as error:
            del self._pools[process]
            self._where = {key: where for key, where in self._where.items() if where != process}
            raise Unavailable("its process died") from error

    def prepare(self, key: str, process: Process, build: Callable[..., tuple[Step, Any]], *args: Any) -> Any:
        """Have ``build(*args)`` make a step there, and keep it under ``key``; returns what it made beside the step."""
        about = self.run(process, _prepare, key, build, args)
        self._where[key] = process
        return about

    def take_turns(self, *, rounds: int, block_seconds: float, warm: bool = True, label: str = "") -> dict[str, Turns]:
        """Time all that is prepared, A B C A B C ..., each turn as many calls as fill ``block_seconds``.

        With ``warm``, a turn begins with `WARM_SECONDS` of calls, at least one, which are not timed.
        """
        samples: dict[str, list[tuple[float, float]]] = {key: [] for key in self._where}
        calls = {key: self._calls(key, block_seconds) for key in samples}
        with Progress(rounds * len(samples), label=label, unit="turns") as progress:
            for _ in range(rounds):
                for key in samples:
                    samples[key].append(self.run(self._where[key], _time, key, calls[key], warm))
                    progress.advance(note=key)
        return {
            key: Turns(Timing(tuple(wall for wall, _ in pairs)), median(busy for _, busy in pairs), calls[key])
            for key, pairs in samples.items()
        }

    def forget(self) -> None:
        """Drop all prepared steps with their memory; the processes stay."""
        for process in self._pools:
            self.run(process, _forget)
        self._where.clear()

    def _calls(self, key: str, block_seconds: float) -> int:
        seconds, _ = self.run(self._where[key], _time, key, 1, False)
        if seconds < block_seconds:  # the first call of all is slow
            seconds, _ = self.run(self._where[key], _time, key, 2, True)
        return max(1, round(block_seconds / max(seconds, 1e-7)))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.shutdown()


_steps: dict[str, Step] = {}
_at_forget: list[Callable[[], None]] = []


def at_forget(function: Callable[[], None]) -> None:
    """Register a function for this process to call when the prepared steps are dropped."""
    if function not in _at_forget:
        _at_forget.append(function)


def _start(threads: int) -> None:
    keep_freed_memory()  # all rows alike
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


def _prepare(key: str, build: Callable[..., tuple[Step, Any]], args: tuple[Any, ...]) -> Any:
    _steps[key], about = build(*args)
    gc.collect()
    gc.freeze()
    return about


def _time(key: str, calls: int, warm: bool) -> tuple[float, float]:
    """Seconds of a call, and the share of the cores' time that it took."""
    step = _steps[key]
    time.sleep(REST_SECONDS)
    until = time.perf_counter() + WARM_SECONDS
    if warm:
        step()
    while warm and time.perf_counter() < until:
        step()
    gc.collect()
    gc.disable()
    try:
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(calls):
            step()
        seconds = time.perf_counter() - start
        return seconds / calls, (time.process_time() - cpu) / seconds
    finally:
        gc.enable()


def _forget() -> None:
    _steps.clear()
    for function in _at_forget:
        function()
    gc.unfreeze()
    gc.collect()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
