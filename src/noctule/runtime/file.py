"""The file of a shipped model: safetensors with the graph as JSON in its header, checked wholly before use and mapped into memory.

Nothing in it is executed. The first entry of the metadata is a CRC-32 of the whole file, its own digits taken as zeros; it finds
torn and rotten files, not forged ones, whose fields are checked one by one.
"""

import json
import math
import mmap
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from noctule.runtime.fields import LARGEST, ModelFileError
from noctule.runtime.graph import Graph

FORMAT = "noctule-runtime"
VERSION = 1
DTYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8}
_PREFIX, _BLANK = b'{"__metadata__":{"checksum":"', b"00000000"


def read(path: str | os.PathLike) -> Graph:
    """Read a graph, whose arrays are the file's own memory where they are used as they are.

    Raises:
        ModelFileError: the file is missing, torn, foreign, too new, or a field of it cannot be.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ModelFileError(f"{path} is empty")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_file(data, str(path))


def parse_file(data: memoryview, path: str) -> Graph:
    """The same for the bytes of a file."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 9 or data[8:9] != b"{":
        raise ModelFileError(f"{path} is no model of noctule.runtime: write one with noctule.export(..., to='noctule')")
    if length > len(data) - 8:
        raise ModelFileError(f"{path} is torn: its header has {length:,} bytes, the file {len(data):,}")
    text = bytes(data[8 : 8 + length])
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        fits = isinstance(metadata, dict) and metadata.get("format") == FORMAT
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path} has no sound header: {error}") from error
    if not fits:
        raise ModelFileError(f"{path} is a safetensors file, but no model of noctule.runtime")
    version = metadata.get("version")
    if not (isinstance(version, str) and version.isdecimal() and len(version) < 10):
        raise ModelFileError(f"{path} has the version {version!r:.50}, which is no number")
    if int(version) > VERSION:
        raise ModelFileError(f"{path} is of version {version}, this noctule.runtime reads {VERSION}: update it")
    if not text.startswith(_PREFIX):
        raise ModelFileError(f"{path} has no checksum")
    blank = _PREFIX + _BLANK + text[len(_PREFIX) + len(_BLANK) :]
    found = zlib.crc32(data[8 + length :], zlib.crc32(blank, zlib.crc32(data[:8])))
    if metadata.get("checksum") != f"{found:08x}":
        raise ModelFileError(
            f"{path} is damaged: its checksum is {found:08x}, it says {metadata.get('checksum')!r:.20}"
        )
    tensors = _tensors(header, data[8 + length :])
    if not isinstance(graph := metadata.get("graph"), str):
        raise ModelFileError(f"{path} has no graph")
    return Graph.from_json(graph, tensors)


def _tensors(header: dict[str, Any], data: memoryview) -> dict[str, np.ndarray]:
    """The arrays of a file; they must fill it without gaps and overlaps."""
    tensors: dict[str, np.ndarray] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        where = f"tensor {name!r:.100}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ModelFileError(f"{where} must have dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ModelFileError(f"{where} has the dtype {dtype!r:.50}, not one of {', '.join(DTYPES)}")
        if not _whole(shape) or len(shape) > 8 or not _whole(offsets) or len(offsets) != 2:
            raise ModelFileError(f"{where} has the shape {shape!r:.100} and the offsets {offsets!r:.100}")
        begin, end = offsets
        numbers = math.prod(shape)
        if end - begin != numbers * np.dtype(DTYPES[dtype]).itemsize or end > len(data):
            raise ModelFileError(f"{where} of shape {shape} cannot lie at bytes {begin:,} to {end:,} of {len(data):,}")
        places.append((begin, end, name))
        array = np.frombuffer(data[begin:end], DTYPES[dtype]).reshape(shape)
        tensors[name] = np.require(array, requirements="A")  # a copy where other writers put it at an odd address
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise ModelFileError(f"tensor {name!r:.100} begins at byte {begin:,}, the one before it ends at {at:,}")
        at = end
    if at != len(data):
        raise ModelFileError(f"tensors end at byte {at:,}, the file at {len(data):,}")
    return tensors


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n <= LARGEST for n in numbers)
