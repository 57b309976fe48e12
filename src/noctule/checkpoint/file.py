"""Safetensors files with a checksum, written and read one tensor at a time.

A file is 8 bytes, a JSON header and the tensors. It is written here, not with the safetensors package, because that needs
contiguous copies of everything at once; here one tensor at a time passes through, and is checked on the way.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noctule.checkpoint.atomic import replacing
from noctule.core.errors import CheckpointError

FORMAT = "noctule-checkpoint"
VERSION = 1

_PREFIX = b'{"__metadata__":{"checksum":"'
_BLANK = b"00000000"  # stands in the checksum's own place while it is computed
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors package
_CHUNK = 1 << 24
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, stamp: bool) -> str:
    """Write safetensors and return the checksum of the file, which `stamp` also puts into the metadata.

    The checksum is zlib.crc32 over every byte, its own digits blank. It is there for bit rot and torn writes, not for
    attackers: CRC-32 finds each burst of up to 32 bits, misses one in 2^32 of the rest, and is the fastest such sum of
    the standard library (3.7 GB/s where SHA-256 does 1.6).
    """
    header: dict[str, Any] = {"__metadata__": {"checksum": _BLANK.decode(), **metadata} if stamp else metadata}
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # wide ones first keeps all aligned
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise CheckpointError(
            f"cannot save {path}: names and plain values take {len(text):,} bytes, more than the {_HEADER_LIMIT:,} "
            "that safetensors allows; keep long lists, str and bytes as tensors"
        )
    with replacing(path) as file:
        file.write(start := len(text).to_bytes(8, "little") + text)
        checksum = zlib.crc32(start)
        for name in order:
            for chunk in _chunks(tensors[name]):
                file.write(chunk)
                checksum = zlib.crc32(chunk, checksum)
        if stamp:
            file.seek(8 + len(_PREFIX))
            file.write(b"%08x" % checksum)
    return f"{checksum:08x}"


def read(path: Path, *, checkpoint: bool) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Read safetensors: the tensors, the metadata, the checksum as found. Allocates no more than the file is long."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if start[8:] != b"{":
                raise CheckpointError(f"{path} {_describe(start)}")
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            text = start[8:] + file.read(length - 1)
            header = json.loads(text)
            metadata = header.pop("__metadata__", {})
            if checkpoint:
                _refuse_foreign(path, metadata)
            places, promised = _lay_out(header)
            if promised != size - 8 - length:
                raise ValueError(f"{promised:,} bytes of tensors announced, {size - 8 - length:,} found")
            if text.startswith(_PREFIX):
                text = _PREFIX + _BLANK + text[len(_PREFIX) + len(_BLANK) :]
            checksum = zlib.crc32(text, zlib.crc32(start[:8]))
            tensors: dict[str, Tensor] = {}
            for name, (shape, dtype) in places.items():
                tensors[name] = torch.empty(shape, dtype=dtype)
                for chunk in _chunks(tensors[name]):
                    if file.readinto(chunk) != len(chunk):
                        raise ValueError("it became shorter while it was read")
                    checksum = zlib.crc32(chunk, checksum)
            return tensors, metadata, f"{checksum:08x}"
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except MALFORMED as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); use another checkpoint") from error


def _lay_out(header: dict[str, Any]) -> tuple[dict[str, tuple[list[int], torch.dtype]], int]:
    """Check the entries of a header: (shape and dtype by name, in file order; bytes of all tensors)."""
    places, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
        sound = (
            all(type(n) is int and n >= 0 for n in [*shape, begin, end]) and math.prod(n or 1 for n in shape) < 2**58
        )
        if not sound or begin != position or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} cannot be at bytes {begin} to {end}")
        places[name], position = (shape, dtype), end
    return places, position


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces: its own where it is contiguous and on the CPU, else those of a copy."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    data = memoryview(plain.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]


def _refuse_foreign(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file but no Noctule checkpoint (its format is {metadata.get('format')!r}); "
            "read models with load_model, other files with the safetensors package"
        )
    if int(metadata["version"]) > VERSION:
        raise CheckpointError(f"{path} is of version {metadata['version']}, this Noctule reads {VERSION}: update it")


def _describe(start: bytes) -> str:
    """Guess the format of a file that is not safetensors from its first bytes, and say what to do."""
    advice = "nothing is ever unpickled here: torch.load(..., weights_only=True) it yourself and save it again"
    if not start:
        return "is empty; use another checkpoint"
    if start.startswith(b"PK\x03\x04"):
        return f"is a zip archive, as torch.save writes; {advice}"
    if start[0] == 0x80 and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return f"is a pickle; {advice}"
    if len(start) < 9:
        return f"is truncated to {len(start)} bytes; use another checkpoint"
    return "is neither a Noctule checkpoint nor any safetensors file; use another one"
