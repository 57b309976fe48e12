"""Tables as the page's template takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from noctule.report.units import MISSING


@dataclass(frozen=True)
class Cell:
    """A cell; `kind` is a class of the style sheet: none, worse, points."""

    text: str = ""
    kind: str = ""
    span: int = 1
    """The number of columns that it takes."""


@dataclass(frozen=True)
class Row:
    """A row with its head; `kind` are classes of the style sheet: total, part, whole."""

    head: str
    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table: the heads of its columns, that of the rows' heads first."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Row]


EMPTY = Cell(kind="none")


def value_cell(words: str) -> Cell:
    """A cell with a value, set back where there is none."""
    return Cell(words, "none" if words == MISSING else "")
