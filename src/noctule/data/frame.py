"""Samples as they were read, before any encoding: a table with named columns, or an array."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

MISSING = frozenset(
    ("", "?", "NA", "N/A", "n/a", "#N/A", "<NA>", "nan", "NaN", "NAN", "-nan", "null", "NULL", "None", "NaT")
)
"""Texts that stand for a missing value."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A table: columns by name, each of the same length.

    A column is float64 with NaN where a value is missing, datetime64 with NaT, or an object array of text, where "" and
    the other texts of `MISSING` are missing values. Booleans are the texts True and False.
    """

    columns: dict[str, np.ndarray]
    _: KW_ONLY
    source: str
    """Name of the table in errors: its path, or "the DataFrame"."""
    lines: np.ndarray | None = None
    """The line of each row in its file."""
    named: bool = True
    """Whether the source has names for columns; else they are "column 1", "column 2" and so on."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: np.ndarray) -> "Frame":
        """The rows with these numbers."""
        lines = None if self.lines is None else self.lines[rows]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Frame(columns, source=self.source, lines=lines, named=self.named)

    def without(self, name: str) -> "Frame":
        """The table without a column."""
        columns = {other: values for other, values in self.columns.items() if other != name}
        return Frame(columns, source=self.source, lines=self.lines, named=self.named)

    def place(self, row: int) -> str:
        """Description of a row's place: file and line, or source and row number from 0."""
        return f"{self.source}, " + (f"row {row}" if self.lines is None else f"line {self.lines[row]}")


@dataclass(frozen=True, eq=False)
class Arrays:
    """Inputs (rows, ...), and labels (rows,) or None."""

    inputs: np.ndarray
    labels: np.ndarray | None
    _: KW_ONLY
    source: str
    files: Sequence[str] | None = None
    """The file of each row, if each has a file."""
    label_name: str = "label"
    note: str = ""
    """Description of what the reader did to the samples, such as a resize."""
    always_classes: bool = False
    """Whether the labels are classes even if they look like numbers, as names of folders may."""

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: np.ndarray) -> "Arrays":
        """The rows with these numbers."""
        labels = None if self.labels is None else self.labels[rows]
        files = None if self.files is None else [self.files[row] for row in rows.tolist()]
        return replace(self, inputs=self.inputs[rows], labels=labels, files=files)

    def place(self, row: int) -> str:
        """Description of a row's place: source and file, or source and row number."""
        return f"{self.source}, " + (f"row {row}" if self.files is None else self.files[row])


def unnamed(matrix: np.ndarray, *, source: str) -> Frame:
    """A table without names from a matrix of numbers."""
    columns = {f"column {at + 1}": matrix[:, at].astype(np.float64) for at in range(matrix.shape[1])}
    return Frame(columns, source=source, named=False)
