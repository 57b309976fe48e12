"""The target of a prediction: classes with names, or a number; and the decision between the two."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from noctule.core.errors import DataError, UsageError
from noctule.data.cells import number_style, to_number

Task = Literal["auto", "classification", "regression"]
Label = str | int | float

FEW_CLASSES = 10
"""Most different whole numbers that are classes."""
_LEAST_SAMPLES = 5
"""Least samples of each class where more different whole numbers are classes."""
_LARGEST_EXACT = 2**53
_CODE = re.compile(r"0\d")
_ABSENT = frozenset(("", "nan", "NaN", "NaT", "<NA>"))


@dataclass(frozen=True)
class Target:
    """The classes, by their names in the order of their numbers; none in a regression."""

    name: str
    labels: tuple[Label, ...] = ()
    why: str = ""
    """The reason for the decision between classes and a number."""

    @property
    def task(self) -> str:
        """Classification or regression."""
        return "classification" if self.labels else "regression"

    def encode(self, values: np.ndarray, place: Callable[[int], str]) -> np.ndarray:
        """Encode a column of labels as class numbers (int64), or as numbers (float64).

        Raises:
            DataError: a label is missing, no number or of no known class; with its place.
        """
        cells = _cells(values, place)
        if not self.labels:
            return _numbers(cells, self.name, place)
        at = {_key(label): number for number, label in enumerate(self.labels)}
        numbers = np.array([at.get(_key(label), -1) for label in cells], np.int64)
        if (numbers < 0).any():
            row = int((numbers < 0).argmax())
            raise DataError(
                f"{place(row)} has the label {str(_plain(cells[row]))[:80]!r}, which no train sample has; correct it, or add train "
                "samples of this class"
            )
        return numbers

    def describe(self) -> str:
        """A description: the name, the task and the numbers of the classes."""
        if not self.labels:
            return f"target {self.name!r}: a number, so this is a regression{self._why}"
        shown = [f"{label} = {number}" for number, label in enumerate(self.labels[:20])]
        more = f", ... {self.labels[-1]} = {len(self.labels) - 1}" if len(self.labels) > 20 else ""
        return f"target {self.name!r}: {len(self.labels)} classes{self._why}: {', '.join(shown)}{more}"

    @property
    def _why(self) -> str:
        return f" ({self.why})" if self.why else ""


def fit_target(name: str, values: np.ndarray, place: Callable[[int], str], *, task: Task = "auto") -> Target:
    """Find the sorted classes in a column of labels, or decide for a regression.

    Text and booleans are classes; so are whole numbers if there are few, or many samples of each. `task` overrides
    the decision.

    Raises:
        DataError: labels are missing, there is one class only, or a different label in every row.
        UsageError: a regression on labels that are no numbers.
    """
    cells = _cells(values, place)
    if not cells:
        raise DataError(f"the target {name!r} has no label: give one for each sample")
    counts = Counter(map(_key, cells))
    numeric = all(isinstance(key, float) for key in counts)
    if task == "regression":
        if not numeric:
            text = next(str(cell) for cell in cells if isinstance(_key(cell), str))
            raise UsageError(f"the target {name!r} holds {text[:80]!r}, which is no number: it can be classified only")
        _numbers(cells, name, place)
        return Target(name, why="as requested")
    why = "as requested"
    if task == "auto":
        classes, why = _are_classes(counts) if numeric else (True, "")
        if not classes:
            _numbers(cells, name, place)
            return Target(name, why=f"{why}; --task classification makes them classes")
    if len(counts) == 1:
        raise DataError(
            f"the target {name!r} is {str(_plain(cells[0]))[:80]!r} in all {len(cells)} rows: there is nothing to learn with one "
            "class only. Name another column (--target), or add samples of other classes"
        )
    if len(counts) > max(2 * FEW_CLASSES, len(cells) / 2) and task == "auto":
        raise DataError(
            f"the target {name!r} has {len(counts)} different texts in {len(cells)} rows, such as {str(cells[0])[:80]!r}: "
            "these are no classes. Name the column that is to be predicted (--target)"
        )
    names = {_key(cell): cell for cell in reversed(cells)}
    labels = tuple(_plain(names[key]) for key in sorted(counts, key=lambda key: (isinstance(key, str), key)))
    return Target(name, labels=labels, why=why)


def _are_classes(counts: Counter[float | str]) -> tuple[bool, str]:
    """Whether numbers are classes, and the reason."""
    values, rows = sorted(float(key) for key in counts), sum(counts.values())
    if not all(value == math.floor(value) and abs(value) < _LARGEST_EXACT for value in values):
        return False, "not all are whole numbers"
    from_start = values[0] in (0.0, 1.0) and values[-1] - values[0] == len(values) - 1
    if len(values) <= FEW_CLASSES and (from_start or len(values) <= 2 or len(values) < rows):
        return True, ""
    if from_start and min(counts.values()) >= _LEAST_SAMPLES:
        return True, "--task regression makes them numbers to predict"
    return False, f"{len(values)} different whole numbers in {rows} rows"


def _cells(values: np.ndarray, place: Callable[[int], str]) -> list[Label]:
    """Labels as numbers or text, none missing."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"labels of shape {values.shape}; give one class number per sample (argmax of one-hot)")
    if values.dtype.kind == "M":
        raise DataError(
            f"{place(0)}: the target holds dates; turn them into numbers, or name another column (--target)"
        )
    if values.dtype.kind not in "biufUO":
        raise DataError(f"labels of type {values.dtype}; give integers or text")
    cells: list[Label] = []
    for row, cell in enumerate(values.tolist() if values.dtype.kind != "O" else map(_stripped, values)):
        if cell is None or cell != cell or (isinstance(cell, str) and cell in _ABSENT):
            raise DataError(f"{place(row)}: no label; give one, or leave out the row")
        cells.append(cell)
    if any(isinstance(cell, str) for cell in cells):
        return _texts_or_numbers(cells)
    return cells


def _texts_or_numbers(cells: list[Label]) -> list[Label]:
    texts = [str(cell) for cell in cells]
    if any(_CODE.match(text) for text in set(texts)):
        return list(texts)
    form = number_style(set(texts)) or "plain"
    read = {text: to_number(text, form) for text in set(texts)}
    if any(number is None for number in read.values()):
        return list(texts)
    return [read[text] or 0.0 for text in texts]


def _stripped(value: object) -> Label | None:
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value.item() if isinstance(value, np.generic) else value).strip()


def _numbers(cells: list[Label], name: str, place: Callable[[int], str]) -> np.ndarray:
    for row, cell in enumerate(cells):
        if isinstance(cell, str):
            raise DataError(f"{place(row)}: {cell[:80]!r} in the target {name!r} is no number; correct it")
    numbers = np.array(cells, np.float64)
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(numbers.astype(np.float32))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{place(row)}: {cells[row]!r} in the target {name!r} is no finite number (as float32); correct it"
        )
    return numbers


def _key(label: Label) -> float | str:
    """The key by which labels are compared: 1, 1.0 and True are equal."""
    return label if isinstance(label, str) else float(label)


def _plain(label: Label) -> Label:
    """A label as it is stored in JSON: whole numbers as int."""
    if isinstance(label, str | bool):
        return str(label)
    return int(label) if label == math.floor(label) and abs(label) < _LARGEST_EXACT else float(label)
