"""How the C library gives memory back to the system, and how to have it not do so."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 32 << 20
"""Bytes of the largest block that glibc lets its heap keep."""


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next tensors; returns whether the C library can.

    glibc gives large blocks back to the system as they are freed and gets them anew, page by page, until it has learnt their
    sizes; where sizes change it never has. For activations of some megabytes that costs more than a sparse layer itself. From now
    on blocks of up to 32 MiB stay, for all of torch. The process stays as large as it once was; its peak is the same.
    ``noctule run`` and ``noctule bench`` do this.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, such as musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
