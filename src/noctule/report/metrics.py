"""`metrics.jsonl`: one JSON object a line, readable after the process that wrote it was killed in the middle of one."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from noctule.core.errors import DataError
from noctule.report import files


def append(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Append one line and return its record; a torn last line is removed first. ValueError unless `record` is a mapping."""
    if not isinstance(record, Mapping):
        raise ValueError(f"A metrics record is a dict, not {type(record).__name__}: {record!r}.")
    stored = files.plain(record)
    line = memoryview(files.to_json(stored) + b"\n")
    with files.writing(path), open(path, "a+b", buffering=0) as file:
        _drop_torn_line(file)
        while line:
            line = line[file.write(line) :]
    return stored


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, oldest first; none when there is no file. DataError names a line that is not a JSON object."""
    return [record for _, record in _lines(path)]


def rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep only the lines whose record `keep` accepts, in one step and byte for byte."""
    if path.exists():
        files.replace(path, b"".join(line + b"\n" for line, record in _lines(path) if keep(record)))


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    return [(line, _record(line, path, number)) for number, line in enumerate(lines, 1) if line.strip()]


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(f"Line {number} of {path} is not a JSON object: {line[:80]!r}. Remove that line to go on.")
    return record


def _drop_torn_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.readall().rfind(b"\n") + 1)
