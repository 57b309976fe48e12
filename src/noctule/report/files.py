"""Write a file whole or not at all, as JSON that any reader accepts."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from noctule.core.errors import DataError, NoctuleError


def refuse(value: object) -> Any:
    """Raise ValueError: JSON has no word for `value`."""
    raise ValueError(
        f"{value!r} ({type(value).__name__}) cannot be stored as JSON: give numbers, text, lists or dicts."
    )


def plain(value: object, *, other: Callable[[object], Any] = refuse) -> Any:
    """`value` in JSON's own words: NaN and infinities are None, a tensor or array of one element is its number.

    `other` converts what JSON cannot hold; by default it raises ValueError.

    >>> plain({"loss": float("nan"), "shape": (2, 3)})
    {'loss': None, 'shape': [2, 3]}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, other=other) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, other=other) for item in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item(), other=other)  # type: ignore[attr-defined]
    return other(value)


def to_json(value: object, *, indent: int | None = None) -> bytes:
    """`value`, which is plain, as JSON in ASCII."""
    return json.dumps(value, indent=indent, allow_nan=False).encode("ascii")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` (a full disk, a lost folder) into a NoctuleError with the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise NoctuleError(f"Could not write {path}: {reason}. Make room or mend the folder, then resume.") from error


def replace(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: a reader, or a killed process, sees the old file or the new one."""
    from noctule.checkpoint.atomic import replacing  # brings torch

    with writing(path):
        path.parent.stat()  # a run's folder that has vanished is not made again
        with replacing(path) as file:
            file.write(content)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object stored at `path`; DataError when it is something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): restore it or start a new run.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, not a JSON object: restore it or start a new run.")
    return value
