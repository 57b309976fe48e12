"""CSV files with one sample per line and a label column; a cell that is no number is named with its place."""

import csv
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np

from noctule.errors import DataError

LABEL_NAMES = ("label", "target", "class", "y")


@dataclass(frozen=True, eq=False)
class Table:
    """What a file holds: `inputs` (rows, features) float32, `labels` (rows,) text, `columns` the header, if any."""

    inputs: np.ndarray
    labels: np.ndarray
    columns: tuple[str, ...] | None


def read_table(path: Path) -> Table:
    """Read a text file of cells separated by commas, semicolons or tabs.

    The label column is the one that the header calls label, target, class or y, or else the last one. The first line
    is a header if none of its cells is a number, the label's name apart, or if they count 0, 1, 2, ... to the label.

    Raises:
        DataError: a cell that is no finite number, a missing label, a ragged line; with file, line and column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first_line = file.readline()
            file.seek(0)
            return _read(file, path, delimiter=max(",;\t", key=first_line.count))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no CSV text in UTF-8 ({error}); save it as such") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _read(file, path: Path, *, delimiter: str) -> Table:
    lines = csv.reader(file, delimiter=delimiter)
    rows = (cells for cells in lines if any(map(str.strip, cells)))
    first = next(rows, [])
    names = tuple(cell.strip() for cell in first)
    if len(names) < 2:
        raise DataError(f"{path} needs at least one feature and the label, separated by commas, in its first line")
    header = _is_header(names)
    label = _label_column(path, names) if header else len(names) - 1
    numbers, labels, line_numbers = array("f"), [], array("q")
    for cells in rows if header else chain([first], rows):
        where = f"{path}, line {lines.line_num}"
        if len(cells) != len(names):
            raise DataError(f"{where}: {len(cells)} cells, but the first line has {len(names)}; make them equal")
        text = cells.pop(label).strip()
        if not text:
            raise DataError(f"{where}, column {label + 1}: no label; give one, or leave out the line")
        try:
            numbers.extend(map(float, cells))
        except ValueError:
            _refuse(where, cells, label)
        labels.append(text)
        line_numbers.append(lines.line_num)
    if not labels:
        raise DataError(f"{path} has a header but no samples; give one line per sample")
    inputs = np.frombuffer(numbers, np.float32).reshape(len(labels), len(names) - 1)
    wrong = (~np.isfinite(inputs)).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        _refuse(f"{path}, line {line_numbers[row]}", [str(number) for number in inputs[row]], label)
    return Table(inputs, np.array(labels, dtype=object), names if header else None)


def _is_header(names: Sequence[str]) -> bool:
    others = [name for name in names if name.lower() not in LABEL_NAMES]
    counted = len(others) < len(names) and others == [str(number) for number in range(len(others))]
    return counted or all(_number(name) is None for name in others)


def _label_column(path: Path, names: Sequence[str]) -> int:
    named = [column for column, name in enumerate(names) if name.lower() in LABEL_NAMES]
    if "" in names:
        raise DataError(
            f"{path}: column {names.index('') + 1} has no name in the header; name it, or leave it out if it only "
            "counts the rows (pandas: to_csv(..., index=False))"
        )
    if len(named) > 1:
        both = ", ".join(repr(names[column]) for column in named)
        raise DataError(f"{path}: the columns {both} could each be the label; rename all but one")
    return named[0] if named else len(names) - 1


def _refuse(where: str, cells: Sequence[str], label: int) -> NoReturn:
    for position, cell in enumerate(cells):
        number = _number(cell)
        if number is None or not math.isfinite(number):
            column = position + (position >= label) + 1
            raise DataError(
                f"{where}, column {column}: {cell[:80]!r} is no finite number (as float32); every cell but the label "
                "must be one: fill in or leave out what is missing, and turn categories into numbers"
            )
    raise AssertionError(where)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
