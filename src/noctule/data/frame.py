"""Samples as they were read, before anything is made of them: a table with named columns, or an array."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

MISSING = frozenset(
    ("", "?", "NA", "N/A", "n/a", "#N/A", "<NA>", "nan", "NaN", "NAN", "-nan", "null", "NULL", "None", "NaT")
)
"""Texts that stand for a value that is not there."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A table: columns by name, each of the same length.

    A column is float64 with NaN where a value is missing, datetime64 with NaT, or an object array of text, where "" and
    the other texts of `MISSING` are missing values. Booleans are the texts True and False.
    """

    columns: dict[str, np.ndarray]
    _: KW_ONLY
    source: str
    """What an error calls it: its path, or "the DataFrame"."""
    lines: np.ndarray | None = None
    """The line of each row in its file."""
    named: bool = True
    """Whether the columns came with names; else they are "column 1", "column 2" and so on."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: np.ndarray) -> "Frame":
        """The rows with these numbers."""
        lines = None if self.lines is None else self.lines[rows]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Frame(columns, source=self.source, lines=lines, named=self.named)

    def without(self, name: str) -> "Frame":
        """The other columns."""
        columns = {other: values for other, values in self.columns.items() if other != name}
        return Frame(columns, source=self.source, lines=self.lines, named=self.named)

    def place(self, row: int) -> str:
        """Where a row is, in words: file and line, or source and row number from 0."""
        return f"{self.source}, " + (f"row {row}" if self.lines is None else f"line {self.lines[row]}")


@dataclass(frozen=True, eq=False)
class Arrays:
    """Inputs (rows, ...) and labels (rows,), or None where there are none."""

    inputs: np.ndarray
    labels: np.ndarray | None
    _: KW_ONLY
    source: str
    files: Sequence[str] | None = None
    """The file of each row, where each has its own."""
    label_name: str = "label"
    note: str = ""
    """What was done to the samples as they were read, for the user to know."""
    always_classes: bool = False
    """Whether the labels are classes whatever they are: names of folders, say."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.inputs)

    def take(self, rows: np.ndarray) -> "Arrays":
        """The rows with these numbers."""
        labels = None if self.labels is None else self.labels[rows]
        files = None if self.files is None else [self.files[row] for row in rows.tolist()]
        return replace(self, inputs=self.inputs[rows], labels=labels, files=files)

    def place(self, row: int) -> str:
        """Where a row is, in words."""
        return f"{self.source}, " + (f"row {row}" if self.files is None else self.files[row])
