"""The peak of memory in use while a block runs: resident memory of this process, and memory of its CUDA devices."""

import functools
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from noctule.measure.background import repeating


class Peak:
    """The highest value seen, in bytes, and how it was found where that is not exact."""

    def __init__(self, *, note: str | None = None) -> None:
        self.peak_bytes = 0
        self.note = note

    def see(self, value_bytes: int) -> None:
        """Take a value into account."""
        self.peak_bytes = max(self.peak_bytes, value_bytes)


class HighWater:
    """A high-water mark that the system keeps, shared by any number of nested or concurrent watchers.

    A new watcher resets the mark; what it showed until then goes to the watchers that are there.
    """

    def __init__(self, read: Callable[[], int], reset: Callable[[], None]) -> None:
        """`read` returns the bytes of the mark, `reset` lowers it to what is in use now."""
        self._read = read
        self._reset = reset
        self._watchers: list[Peak] = []
        self._lock = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[Peak]:
        """Watch while the block runs."""
        peak = Peak()
        with self._lock:
            self._update()
            self._reset()
            self._watchers.append(peak)
        try:
            yield peak
        finally:
            with self._lock:
                self._update()
                self._watchers.remove(peak)

    def _update(self) -> None:
        if self._watchers:
            value = self._read()
            for watcher in self._watchers:
                watcher.see(value)


def resident_bytes() -> int | None:
    """Resident memory of this process now, or None where the system does not say."""
    return _status_bytes("VmRSS")


def resident_peak() -> AbstractContextManager[Peak]:
    """Watch the peak of resident memory with the best means this system has."""
    if _can_reset_resident():
        return _RESIDENT.watching()
    return sampled_peak() if resident_bytes() is not None else lifetime_peak()


@contextmanager
def sampled_peak(*, every_seconds: float = 0.005) -> Iterator[Peak]:
    """Watch resident memory by sampling: short peaks can be missed."""
    peak = Peak(note=f"sampled every {every_seconds * 1000:g} ms: shorter peaks of memory may be missing")
    with repeating(lambda: peak.see(resident_bytes() or 0), every_seconds=every_seconds):
        yield peak


@contextmanager
def lifetime_peak() -> Iterator[Peak]:
    """Report the peak since the process started, where the system offers nothing better."""
    peak = Peak(note="the peak of memory is that of the whole process so far, not of the block alone")
    try:
        yield peak
    finally:
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        peak.see(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes)


def cuda_peak() -> AbstractContextManager[Peak]:
    """Watch the bytes that torch has allocated on all CUDA devices (the sum of their peaks); 0 without CUDA."""
    return _CUDA.watching()


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_resident() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@functools.cache  # asked once, before anyone watches: the question itself resets the mark
def _can_reset_resident() -> bool:
    try:
        _reset_resident()
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


def _read_cuda() -> int:
    if not torch.cuda.is_initialized():  # asking would start CUDA, which costs hundreds of megabytes
        return 0
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def _reset_cuda() -> None:
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


_RESIDENT = HighWater(lambda: _status_bytes("VmHWM") or 0, _reset_resident)
_CUDA = HighWater(_read_cuda, _reset_cuda)
