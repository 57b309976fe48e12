"""Settings of the C library's allocator that keep freed memory in the process."""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_KEEP_SMALL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 2**31 - 1}  # the heap takes no larger block than 32 MiB
_KEEP_ALL = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}  # give nothing back, map nothing apart
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 1 << 16}
_HUGE = "THP_MEM_ALLOC_ENABLE"


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for its next tensors; returns whether the C library can.

    glibc gives large blocks back to the system as they are freed and gets them anew, page by page, until it has learnt their
    sizes; where sizes change it never has. For activations of some megabytes that costs more than a sparse layer itself. From now
    on blocks of up to 32 MiB stay, for all of torch. The process stays as large as it once was; its peak is the same.
    ``noctule run`` and ``noctule bench`` do this.
    """
    return _set(_KEEP_SMALL)


@contextmanager
def keep_memory() -> Iterator[None]:
    """Keep freed memory within the block, of any size, in huge pages where the system has them.

    Saves a third of the time of a step whose tensors take gigabytes. Torch asks for huge pages only if the environment says so
    before the first tensor of the process; without glibc nothing happens.
    """
    before = os.environ.get(_HUGE)
    os.environ.setdefault(_HUGE, "1")
    _set(_KEEP_ALL)
    try:
        yield
    finally:
        if _set(_DEFAULTS):
            ctypes.CDLL(None).malloc_trim(0)
        if before is None:
            os.environ.pop(_HUGE, None)


def _set(options: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, such as musl
        return False
    accepted = [mallopt(option, value) for option, value in options.items()]
    return all(accepted)
