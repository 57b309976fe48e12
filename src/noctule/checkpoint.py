"""Keep training state in single checked files that survive kills and full disks, and never unpickle anything.

A checkpoint is a safetensors file (8 bytes, a JSON header, the tensors) whose metadata also holds the tree of plain
values. It is written here, not with the safetensors package, because that needs contiguous copies of everything at
once; here one tensor at a time passes through, and is checked on the way.
"""

import base64
import errno
import fcntl
import glob
import json
import math
import os
import re
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from noctule.errors import CheckpointError

FORMAT = "noctule-checkpoint"
VERSION = 1

_PREFIX = b'{"__metadata__":{"checksum":"'
_BLANK = b"00000000"  # stands in the checksum's own place while it is computed
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors package
_CHUNK = 1 << 24
_DTYPES = {
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError)


def save(path: str | os.PathLike, state: Any) -> None:
    """Write a tree of plain values and tensors to one file, whole or not at all.

    The tree is made of dicts (str, int or float keys), lists, tuples, None, bool, int, float, str, bytes and dense
    tensors; tensors that share memory, or are views, are copied. Devices and `requires_grad` are not kept.

    Raises CheckpointError, with what was at `path` intact, where something in the tree cannot be kept or the disk is
    full.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/state.safetensors"
    >>> save(path, {"step": 3, "weights": torch.ones(2)})
    >>> load(path)
    {'step': 3, 'weights': tensor([1., 1.])}
    """
    tree, tensors = _pack_all(state)
    metadata = {"format": FORMAT, "version": str(VERSION), "tree": json.dumps(tree, separators=(",", ":"))}
    _write(Path(path), tensors, metadata, stamp=True)


def load(path: str | os.PathLike) -> Any:
    """Read what `save` wrote, with its types and dtypes, tensors on the CPU.

    Raises CheckpointError where the file is missing, torn, damaged, foreign or from a newer version.
    """
    tensors, metadata, checksum = _read(Path(path), checkpoint=True)
    if checksum != metadata.get("checksum"):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its contents; use another checkpoint")
    try:
        return _unpack(json.loads(metadata["tree"]), tensors)
    except _MALFORMED as error:
        raise CheckpointError(f"{path} holds no tree that this version can read ({error!r})") from error


class Checkpoints:
    """A folder of checkpoints, one a step, of which the newest `keep` stay.

    >>> import tempfile
    >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep=2)
    >>> checkpoints.save(100, {"epoch": 1}).name
    'step-000000000100.safetensors'
    >>> checkpoints.latest()
    (100, {'epoch': 1})
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2) -> None:
        """Use a folder, which the first `save` makes; `keep` is at least 1."""
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay")
        self.folder = Path(folder)
        self.keep = keep
        self._bad: set[int] = set()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:012d}.safetensors"

    def steps(self) -> list[int]:
        """The steps that have a file, readable or not, oldest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{12})\.safetensors", name)))

    def save(self, step: int, state: Any) -> Path:
        """Write the state of a step, then remove older checkpoints beyond `keep`; later steps are left alone."""
        if not 0 <= step < 10**12:
            raise ValueError(f"step={step}: a step is a number from 0 to 999,999,999,999")
        for leftover in self.folder.glob(".step-*.tmp"):
            _remove_abandoned(leftover)
        save(self.path(step), state)
        self._bad.discard(step)
        older = [s for s in self.steps() if s < step]
        readable = [s for s in older if s not in self._bad]
        for old in {*older}.difference(readable[::-1][: self.keep - 1]):
            with suppress(OSError):
                self.path(old).unlink()
        return self.path(step)

    def latest(self) -> tuple[int, Any] | None:
        """The newest readable checkpoint as (step, state), or None where there is no file.

        A bad one is named in a warning and passed over. Raises CheckpointError where all are bad.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                state = load(self.path(step))
            except CheckpointError as error:
                self._bad.add(step)
                reasons.append(str(error))
                continue
            for reason in reasons:
                warnings.warn(f"passed over a checkpoint for that of step {step}: {reason}", stacklevel=2)
            return step, state
        if reasons:
            raise CheckpointError("no checkpoint is readable:\n  " + "\n  ".join(reasons))
        return None


def save_model(path: str | os.PathLike, state: dict[str, Any], structure: dict[str, Any]) -> None:
    """Write a model as `model.safetensors`, which any tool reads, and `model.json`, its structure.

    `path` is a folder, or a file named *.safetensors. `state` is a `state_dict()`: tensors inside extra states get
    dotted names ("0._extra_state.columns"), what is not a tensor goes to the JSON. `structure` is plain JSON.

    Raises CheckpointError where something cannot be kept or the disk is full.
    """
    weights_path, json_path = _model_paths(Path(path))
    try:
        plain = json.loads(json.dumps(structure, allow_nan=False)) == structure
    except (TypeError, ValueError, RecursionError):
        plain = False
    if not plain:
        raise CheckpointError(
            f"a structure is plain JSON (dicts with str keys, lists, numbers, str), not {structure!r}"
        )
    tree, tensors = _pack_all(state)
    checksum = _write(weights_path, tensors, {"format": "pt"}, stamp=False)
    entries = {
        "format": "noctule-model",
        "version": VERSION,
        "structure": structure,
        "checksum": checksum,
        "state": tree,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
    with _replacing(json_path) as file:
        file.write(f"{{\n{lines}\n}}\n".encode())


def load_model(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_model` wrote: (state, structure), tensors on the CPU.

    Raises CheckpointError where a file is missing, damaged or foreign, or the two do not belong together; warns where
    the weights were changed since.
    """
    weights_path, json_path = _model_paths(Path(path))
    try:
        entries = json.loads(json_path.read_bytes())
        if entries["format"] != "noctule-model" or entries["version"] > VERSION:
            raise ValueError(f"format {entries['format']!r}, version {entries['version']!r}")
        tree, structure, checksum = entries["state"], entries["structure"], entries["checksum"]
    except OSError as error:
        raise CheckpointError(f"cannot read {json_path}, the structure of the model: {error.strerror}") from error
    except _MALFORMED as error:
        raise CheckpointError(f"{json_path} is no model structure that this version can read ({error!r})") from error
    tensors, _, found = _read(weights_path, checkpoint=False)
    try:
        state = _unpack(tree, tensors)
    except _MALFORMED as error:
        raise CheckpointError(f"{weights_path} and {json_path} do not belong together ({error!r})") from error
    if tensors:
        raise CheckpointError(f"{weights_path} has tensors that {json_path} does not know: {', '.join(tensors)}")
    if found != checksum:
        warnings.warn(f"{weights_path} was changed, or damaged, since {json_path} was written", stacklevel=2)
    return state, structure


def _model_paths(path: Path) -> tuple[Path, Path]:
    weights_path = path if path.suffix == ".safetensors" else path / "model.safetensors"
    return weights_path, weights_path.with_suffix(".json")


# The tree. JSON has no tuples, bytes, NaN, or keys other than str: each becomes an object with one telling key.


def _pack_all(state: Any) -> tuple[Any, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    try:
        return _pack(state, "", tensors), tensors
    except RecursionError:
        raise CheckpointError("cannot save a state that contains itself or is nested hundreds deep") from None


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    kind = type(value)  # exact: a numpy float is a float by inheritance, and would come back as another type
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if value.bit_length() < 64 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind in (list, tuple):
        items = [_pack(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int, float):
                raise CheckpointError(f"cannot save {place or 'the state'}: its key {key!r} is no str, int or float")
            label = _pack(key, place, tensors)
            inner = f"{place}[{label}]" if type(key) is not str else f"{place}.{key}" if place else key
            pairs.append([label, _pack(item, inner, tensors)])
        packed = {kind.__name__: pairs}
        if kind is OrderedDict and (versions := vars(value).get("_metadata")):  # those of a state_dict's modules
            packed["_metadata"] = _pack(versions, f"{place}._metadata", tensors)
        return packed
    if kind in (Tensor, torch.nn.Parameter):
        return {"tensor": _register(value, place, tensors)}
    what = f"a function, {value!r}" if callable(value) else f"a {kind.__module__}.{kind.__qualname__}"
    raise CheckpointError(
        f"cannot save {place or 'the state'}: it is {what}; a checkpoint holds dicts, lists, tuples, numbers, str, "
        "bytes, None and tensors: convert it to those"
    )


def _register(tensor: Tensor, place: str, tensors: dict[str, Tensor]) -> str:
    """Note a tensor under its place in the tree, or a name like it where that is taken."""
    if tensor.dtype not in _NAMES or tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"cannot save {place or 'the state'}: a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device} has "
            "no form in safetensors; convert it first"
        )
    name = text = place.encode(errors="replace").decode() or "state"
    count = 1
    while name in tensors or name == "__metadata__":
        name = f"{text}#{(count := count + 1)}"
    tensors[name] = tensor
    return name


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    kind, content = next(iter(node.items()))
    match kind:
        case "tensor":
            return tensors.pop(content)
        case "dict":
            return {_unpack(key, tensors): _unpack(item, tensors) for key, item in content}
        case "OrderedDict":
            ordered = OrderedDict((_unpack(key, tensors), _unpack(item, tensors)) for key, item in content)
            if "_metadata" in node:
                ordered._metadata = _unpack(node["_metadata"], tensors)  # pyright: ignore
            return ordered
        case "tuple":
            return tuple(_unpack(item, tensors) for item in content)
        case "bytes":
            return base64.b64decode(content, validate=True)
        case "int":
            return int(content, 16)
        case "float":
            return float(content)
    raise ValueError(f"unknown kind of value {kind!r}")


# The file.


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, stamp: bool) -> str:
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
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise CheckpointError(
            f"cannot save {path}: names and plain values take {len(text):,} bytes, more than the {_HEADER_LIMIT:,} "
            "that safetensors allows; keep long lists, str and bytes as tensors"
        )
    with _replacing(path) as file:
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


def _read(path: Path, *, checkpoint: bool) -> tuple[dict[str, Tensor], dict[str, str], str]:
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
    except _MALFORMED as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); use another checkpoint") from error


def _lay_out(header: dict[str, Any]) -> tuple[dict[str, tuple[list[int], torch.dtype]], int]:
    """Check what a header says of its tensors: (shape and dtype by name, in file order; bytes of all)."""
    places, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = _DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
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
    """What a file that is not safetensors seems to be, from its first bytes, and what to do."""
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


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when it is whole and on the disk, and leaves no trace otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns():x}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            _remove_abandoned(leftover)
        with open(temporary, "xb") as file:
            with suppress(OSError):  # some network folders have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # until the process lets go or dies: see _remove_abandoned
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # the new name is on the disk only when the folder is
        except OSError as error:
            if error.errno != errno.EINVAL:  # what network folders say that cannot do so
                raise
        finally:
            os.close(folder)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "; free some space or choose another disk" if full else ""
        reason = f"could not save {path}: {error.strerror or error}{remedy}; what was saved before is as it was"
        raise CheckpointError(reason) from error


def _remove_abandoned(temporary: Path) -> None:
    """Remove what a killed process left, but not what a living one is writing."""
    with suppress(OSError), open(temporary, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.unlink()
