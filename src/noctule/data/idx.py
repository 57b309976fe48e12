"""The idx format of MNIST: a type code, the dimensions, and the numbers behind them, all big-endian."""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from noctule.core.errors import DataError
from noctule.data.content import open_content, read_at_most

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_DIMENSIONS = 8


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file, gzipped or not.

    Raises:
        DataError: it is no idx file, or its length does not fit its header.
    """
    with open_content(path) as stream:
        return parse_idx(stream, name=str(path))


def parse_idx(stream: BinaryIO, *, name: str) -> np.ndarray:
    """The array in a stream of idx bytes; memory grows with the bytes read, not with the sizes in the header."""
    magic = read_at_most(stream, 4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or not 1 <= magic[3] <= _MOST_DIMENSIONS:
        raise DataError(f"{name} is not an idx file: it begins with {bytes(magic).hex(' ') or 'nothing'}")
    dtype, dimensions = np.dtype(_DTYPES[magic[2]]), magic[3]
    header = read_at_most(stream, 4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{name} is cut short within its header; fetch or write it again")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    if 0 in shape:
        raise DataError(f"{name} is empty: its header says {shape}")
    expected_bytes = math.prod(shape) * dtype.itemsize
    body = read_at_most(stream, expected_bytes)
    if len(body) < expected_bytes or stream.read(1):
        found = f"only {len(body)}" if len(body) < expected_bytes else "more"
        raise DataError(
            f"{name} is corrupt: its header says {shape}, which takes {expected_bytes} bytes, but {found} follow; "
            "fetch or write it again"
        )
    return np.frombuffer(body, dtype).reshape(shape)
