"""Reader of text tables such as CSV, with any separator; errors name the line."""

import csv
from array import array
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

import numpy as np

from noctule.core.errors import DataError
from noctule.data.cells import to_number
from noctule.data.content import open_content
from noctule.data.frame import MISSING, Frame
from noctule.data.sniff import BLANKS, NAMES, Layout, sniff

LABEL_NAMES = ("label", "target", "class", "y")


def read_table(path: Path) -> Frame:
    """Read a text table, gzipped or not; the separator is detected, lines that begin with # are comments.

    The first line is a header if none of its cells but the label's is a number or a value of its column; or if they count
    0, 1, 2, ... up to the label.

    Raises:
        DataError: a ragged line, a name that is missing, no rows, no UTF-8; with file and line.
    """
    try:
        with open_content(path) as raw, TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            layout = sniff(file, path)
            for plain in (True, False):
                file.seek(0)
                if (frame := _read(_Lines(file), path, layout, plain=plain)) is not None:
                    return frame
            raise AssertionError(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no CSV text in UTF-8 ({error}); save it as such") from error


class _Lines:
    """Iterator over the lines of a file without comments; `number` is the last one's."""

    def __init__(self, file: TextIOWrapper) -> None:
        self._file, self.number, self._quoted = file, 0, False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            if not self._quoted and line.lstrip().startswith("#"):
                continue
            if line.count('"') % 2:
                self._quoted = not self._quoted
            yield line


def _rows(lines: _Lines, separator: str) -> Iterator[list[str]]:
    if separator == BLANKS:
        return (line.split() for line in lines if line.strip())
    cells = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    return (row for row in cells if any(map(str.strip, row)))


def _read(lines: _Lines, path: Path, layout: Layout, *, plain: bool) -> Frame | None:
    """Read the table; with `plain`, faster and without texts, and None if a cell is no number."""
    rows = _rows(lines, layout.separator)
    first = next(rows, [])
    width = len(first)
    if width < 2:
        raise DataError(
            f"{path} needs at least one feature and the label in its first line, separated by commas, semicolons, tabs, | or "
            "blanks, which were not found"
        )
    names = layout.comment_header or tuple(cell.strip() for cell in first)
    header = bool(layout.comment_header) or _is_header(names, layout.rows[1:])
    columns = _column_names(names) if header else [f"column {at + 1}" for at in range(width)]
    if not header or layout.comment_header:
        rows = chain([first], rows)
    numbers, line_numbers = array("d"), array("q")
    texts: list[list[str]] = [[] for _ in columns]
    known: dict[str, str] = {}
    for cells in rows:
        if len(cells) != width:
            raise DataError(
                f"{path}, line {lines.number}: {len(cells)} cells, but the first line has {width}, separated by "
                f"{NAMES[layout.separator]}; make them equal"
            )
        line_numbers.append(lines.number)
        if plain:
            try:
                numbers.extend(map(float, cells))
            except ValueError:
                return None
        else:
            for column, cell in zip(texts, map(str.strip, cells), strict=True):
                column.append(known.setdefault(cell, cell))
    if not line_numbers:
        raise DataError(f"{path} has a header but no samples; give one line per sample")
    if plain:
        values = list(np.frombuffer(numbers, np.float64).reshape(-1, width).T)
    else:
        values = [_numbers_or_text(column) for column in texts]
    lines_of_rows = np.frombuffer(line_numbers, np.int64)
    return Frame(dict(zip(columns, values, strict=True)), source=str(path), lines=lines_of_rows, named=header)


def _numbers_or_text(column: list[str]) -> np.ndarray:
    """A column as numbers if each cell is a plain one or missing, else as text."""
    try:
        read = {text: np.nan if text in MISSING else float(text) for text in set(column)}
    except ValueError:
        return np.array(column, object)
    if all(text in MISSING for text in read):
        return np.array(column, object)
    return np.array([read[text] for text in column], np.float64)


def _is_header(names: Sequence[str], below: Sequence[Sequence[str]]) -> bool:
    others = {at: name for at, name in enumerate(names) if name.lower() not in LABEL_NAMES}
    counted = len(others) < len(names) and list(others.values()) == [str(number) for number in range(len(others))]
    if counted:
        return True
    if any(to_number(name) is not None or (name and name in MISSING) for name in others.values()):
        return False
    return not any(name and name == row[at].strip() for at, name in others.items() for row in below if at < len(row))


def _column_names(names: Sequence[str]) -> list[str]:
    """Unique names: empty and repeated ones get a number, as in pandas."""
    found: list[str] = []
    for at, name in enumerate(names):
        number, own = 0, name or f"Unnamed: {at}"
        while own in found:
            number += 1
            own = f"{name}.{number}"
        found.append(own)
    return found
