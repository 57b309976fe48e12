"""Detection of the layout of a text table: its separator, and whether a comment is its header."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from noctule.core.errors import DataError
from noctule.data.cells import to_number

BLANKS = " "
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "|", BLANKS: "blanks"}
"""Names of the separators, for errors."""

_SAMPLE_LINES = 30
"""Lines from which the layout is detected."""
_LIBSVM = re.compile(r"[^\s:]+(\s+\d+:[^\s:]+)+\s*")


@dataclass(frozen=True)
class Layout:
    """The separator, the first rows, and the names of columns if a comment above them is the header."""

    separator: str
    rows: Sequence[Sequence[str]]
    comment_header: tuple[str, ...] = ()


def sniff(lines: Iterable[str], path: Path) -> Layout:
    """Detect the layout from the first lines.

    The separator is one that gives all lines the same number of cells: tabs, semicolons and | before commas, which also
    stand in numbers, and blanks last; else the most frequent one in the first line.

    Raises:
        DataError: a format of another kind (libsvm, ARFF, JSON, a web page), with what to do.
    """
    comments, sample = [], []
    for line in islice(lines, 10_000):
        if line.lstrip().startswith("#"):
            comments += [] if sample else [line.lstrip(" #\t").strip()]
        elif line.strip():
            sample.append(line)
        if len(sample) == _SAMPLE_LINES:
            break
    if not sample:
        return Layout(",", [])
    _refuse_others(sample, path)
    separator = _separator(sample)
    rows = _split(sample, separator)
    header: tuple[str, ...] = ()
    if comments:
        (names,) = _split(comments[-1:], separator) or [[]]
        own = all(to_number(cell) is None for cell in rows[0])
        if len(names) == len(rows[0]) > 1 and not own and all(to_number(name) is None for name in names):
            header = tuple(name.strip() for name in names)
    return Layout(separator, rows, header)


def _separator(sample: list[str]) -> str:
    widths = {separator: [len(row) for row in _split(sample, separator)] for separator in ("\t", ";", "|", ",", BLANKS)}
    for separator, found in widths.items():
        if min(found, default=0) > 1 and len(set(found)) == 1:
            return separator
    if max(sample[0].count(separator) for separator in ",;\t|"):
        return max(",;\t|", key=sample[0].count)
    return BLANKS if min(widths[BLANKS]) > 1 else ","


def _split(sample: list[str], separator: str) -> list[list[str]]:
    if separator == BLANKS:
        return [line.split() for line in sample]
    rows = [row for row in csv.reader(sample, delimiter=separator, skipinitialspace=True) if any(map(str.strip, row))]
    # a quoted cell may go on beyond the last of these lines
    return rows[:-1] if len(rows) > 1 and sum(line.count('"') for line in sample) % 2 else rows


def _refuse_others(sample: list[str], path: Path) -> None:
    first = sample[0].lstrip()
    if all(_LIBSVM.fullmatch(line) for line in sample):
        raise DataError(
            f"{path} is in the format of libsvm (index:value); read it with sklearn.datasets.load_svmlight_file and save "
            "x and y as .npz"
        )
    if first.lower().startswith(("@relation", "%")) and any("@" in line for line in sample):
        raise DataError(f"{path} is an ARFF file; read it with scipy.io.arff.loadarff and save it as CSV")
    if first.lower().startswith(("<!doctype", "<html", "<?xml")):
        raise DataError(f"{path} is a web page, not data: the download went wrong. Fetch it again")
    if first.startswith(("{", "[")) and first.rstrip().endswith(("}", "]", ",", "{", "[")):
        raise DataError(f"{path} is JSON; read it with pandas.read_json and save it as CSV")
