"""The encoding of a table's column as numbers: fitted to the training rows, applied alike to all others."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from noctule.core.errors import DataError
from noctule.data.cells import ISO, PLAIN, date_format, days_of, number_style, to_date, to_number
from noctule.data.frame import MISSING

MOST_LEVELS = 50
"""A category with more levels becomes one number instead of as many inputs."""
_FEW = 0.05
"""Largest share of cells without a number that is taken for mistakes in a column of numbers, not for a category."""
_IDENTIFIER = 0.95
"""Ratio of levels to rows from which on a text is an identifier or prose."""
_FLAGS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
_KEY_NAME = re.compile(r"(|(.*[\s_.-])?(id|index|idx|key|uuid|guid|no|nr)|unnamed.*|row_?(id|names|num(ber)?)?)", re.I)
_KEY_ENDING = re.compile(r".*[a-z](Id|ID)")

Place = Callable[[int], str]
"""Function from a row number to a description of the place, for errors."""


class Skip(Exception):
    """Exception for a column that is left out; the text is the reason."""


class Encoded(NamedTuple):
    """A column's inputs, (rows, width) float32, and a warning about unknown or missing values."""

    inputs: np.ndarray
    warning: str | None


@dataclass(frozen=True)
class Column:
    """The fitted encoding of a column; all fields can be stored as JSON."""

    name: str
    kind: Literal["number", "flag", "category", "index", "date"]
    fill: float = 0.0
    """Replacement of a missing number, flag or date: the median, the commoner flag, the median day."""
    missing: bool = False
    """Whether values are missing in training rows; another input then marks missing values."""
    levels: tuple[str, ...] = ()
    """The levels of a category or an index, the most frequent first."""
    form: str = PLAIN
    """The style of a number or the format of a date in text."""
    origin: float = 0.0
    """The earliest day of a date column, counted from 1970."""
    times: bool = False
    """Whether the dates have times of day."""
    note: str = ""

    @property
    def width(self) -> int:
        """The number of inputs of the column."""
        of = {"category": len(self.levels), "date": 5 if self.times else 3}
        return of.get(self.kind, 1) + self.missing

    def encode(self, values: np.ndarray, place: Place) -> Encoded:
        """Encode the values of rows.

        Raises:
            DataError: a cell holds no number or date as in training; with its place.
        """
        if self.kind in ("category", "index"):
            return self._encode_levels(_texts(values))
        numbers = self._numbers(values, place)
        absent = np.isnan(numbers)
        numbers = np.where(absent, self.fill, numbers)
        if self.kind == "date":
            year, day = 2 * np.pi * numbers / 365.2425, 2 * np.pi * numbers
            outputs = [numbers - self.origin, np.sin(year), np.cos(year)]
            outputs += [np.sin(day), np.cos(day)] if self.times else []
        else:
            outputs = [numbers]
        warning = None
        if self.missing:
            outputs.append(absent)
        elif absent.any():
            warning = f"{self.name!r} is missing in {absent.sum()} rows but in no training row: {self.fill:g} is taken"
        with np.errstate(over="ignore"):
            inputs = np.stack(outputs, axis=1).astype(np.float32)
        if not np.isfinite(inputs).all():
            row = int((~np.isfinite(inputs)).any(axis=1).argmax())
            raise DataError(
                f"{place(row)}, column {self.name!r}: {str(inputs[row, 0])!r} is no finite number (as float32); repair it, "
                "or leave the cell empty if it is not known"
            )
        return Encoded(inputs, warning)

    def _numbers(self, values: np.ndarray, place: Place) -> np.ndarray:
        if values.dtype.kind == "M":
            if self.kind == "date":
                return days_of(values)
            raise DataError(f"column {self.name!r} holds dates, but in training it held numbers; give it as then")
        if values.dtype.kind != "O":
            if self.kind == "date":
                raise DataError(f"column {self.name!r} holds numbers, but in training it held dates; give it as then")
            return values
        read = {text: self._number(text) for text in set(values)}
        if None in read.values():
            row = next(row for row, text in enumerate(values) if read[text] is None)
            raise _not_a(self.kind, self.name, values[row], place(row))
        return np.array([read[text] for text in values], np.float64)

    def _number(self, text: str) -> float | None:
        if text in MISSING:
            return math.nan
        if self.kind == "date":
            return to_date(text, self.form)
        if self.kind == "flag" and text.lower() in _FLAGS:
            return _FLAGS[text.lower()]
        return to_number(text, self.form)

    def _encode_levels(self, texts: np.ndarray) -> Encoded:
        at = {level: position for position, level in enumerate(self.levels)}
        found = {text: -2 if text in MISSING else at.get(text, -1) for text in set(texts)}
        positions = np.array([found[text] for text in texts], np.int64)
        if self.kind == "index":
            inputs = (np.maximum(positions, -1) + 1).astype(np.float32)[:, None]
        else:
            inputs = (positions[:, None] == np.arange(len(self.levels))).astype(np.float32)
        if self.missing:
            inputs = np.concatenate([inputs, (positions == -2)[:, None]], axis=1, dtype=np.float32)
        new = sorted(text for text, position in found.items() if position == -1)
        warning = None
        if new:
            rows = int((positions == -1).sum())
            warning = (
                f"{self.name!r} has {_some(new)} in {rows} rows but in no training row: taken as none of the known"
            )
        elif not self.missing and (absent := int((positions == -2).sum())):
            warning = f"{self.name!r} is missing in {absent} rows but in no training row: taken as none of the known"
        return Encoded(inputs, warning)

    def describe(self) -> str:
        """A short description of the encoding."""
        words = {
            "number": "a number" + ("" if self.form == PLAIN else f" ({self.form})"),
            "flag": "0 or 1",
            "category": f"one input for each of {len(self.levels)} levels: {_some(self.levels)}",
            "index": f"{len(self.levels)} levels, too many for an input each: one number, the rank by frequency",
            "date": "days since the first, and the time of the year" + (", and of the day" if self.times else ""),
        }[self.kind]
        if self.missing:
            known = self.kind in ("category", "index")
            words += "; missing values have an input of their own"
            words += "" if known else f", and {self.fill:g} in their place" if self.kind != "date" else ""
        return words + (f" ({self.note})" if self.note else "")


def fit_column(name: str, values: np.ndarray, place: Place) -> Column:
    """Choose the encoding of a column from its training rows.

    Raises:
        Skip: the column is empty, constant or an identifier.
        DataError: cells that are most likely mistakes; with their place.
    """
    if values.dtype.kind == "M":
        return _fit_numbers(Column(name, "date", form=ISO), days_of(values))
    if values.dtype.kind != "O":
        return _fit_numbers(Column(name, "number"), values)
    counts = Counter(values.tolist())
    present = {text: count for text, count in counts.items() if text not in MISSING}
    if not present:
        raise Skip("empty")
    if all(text.lower() in _FLAGS for text in present):
        column = Column(name, "flag")
    elif (form := _number_form(name, present)) is not None:
        column = Column(name, "number", form=form)
        _refuse_mistakes(column, present, values, place)
        if any(column._number(text) is None for text in present):
            return _fit_levels(name, counts, present)
    elif dated := date_format(present):
        column = Column(name, "date", form=dated[0], note="month before day" if dated[1] and "%m" in dated[0] else "")
        if dated[1] and dated[0].find("%d") < dated[0].find("%m"):
            column = Column(name, "date", form=dated[0], note="day before month")
        _refuse_mistakes(column, present, values, place)
        if any(column._number(text) is None for text in present):
            return _fit_levels(name, counts, present)
    else:
        return _fit_levels(name, counts, present)
    return _fit_numbers(column, column._numbers(values, place))


def _number_form(name: str, present: Iterable[str]) -> str | None:
    """The style of the numbers in a column; None where none of its cells is a number."""
    with_digits = [text for text in present if any(map(str.isdigit, text)) or to_number(text) is not None]
    form = number_style(with_digits)
    if form is None:
        raise DataError(
            f"column {name!r} has numbers like {next(text for text in with_digits if ',' in text)!r}: is the comma that of "
            "thousands or of decimals? Write them without thousands separators and with a decimal point"
        )
    return form if any(to_number(text, form) is not None for text in present) else None


def _refuse_mistakes(column: Column, present: dict[str, int], values: np.ndarray, place: Place) -> None:
    wrong = {text: count for text, count in present.items() if column._number(text) is None}
    cells = sum(wrong.values())
    if wrong and cells <= max(1, _FEW * sum(present.values())):
        row = next(row for row, text in enumerate(values) if text in wrong)
        raise _not_a(column.kind, column.name, values[row], place(row), of=sum(present.values()) - cells)


def _not_a(kind: str, name: str, text: str, where: str, *, of: int | None = None) -> DataError:
    what = "date" if kind == "date" else "finite number"
    others = "as it was in training" if of is None else f"as {of} others of this column are"
    return DataError(
        f"{where}, column {name!r}: {text[:80]!r} is no {what}, {others}; correct it, or leave the cell empty if it is not "
        "known"
    )


def _fit_numbers(column: Column, numbers: np.ndarray) -> Column:
    absent = np.isnan(numbers)
    known = numbers[~absent]
    if not known.size:
        raise Skip("empty")
    least, most = float(known.min()), float(known.max())
    if least == most and not absent.any():
        raise Skip("the same in every training row")
    if column.kind == "number" and not absent.any() and _is_key(column.name, known):
        raise Skip("a different whole number in every row: a key")
    fill = float(np.median(known))
    if column.kind == "flag":
        fill = float(fill >= 0.5)
    missing = bool(absent.any())
    options = {"fill": fill, "missing": missing, "form": column.form, "note": column.note}
    if column.kind == "date":
        options |= {"origin": math.floor(least), "times": bool((known % 1 > 0).any())}
    return Column(column.name, column.kind, **options)


def _is_key(name: str, numbers: np.ndarray) -> bool:
    if not (_KEY_NAME.fullmatch(name) or _KEY_ENDING.fullmatch(name)) or len(numbers) < 3:
        return False
    return bool((numbers == np.floor(numbers)).all()) and len(np.unique(numbers)) == len(numbers)


def _fit_levels(name: str, counts: Counter[str], present: dict[str, int]) -> Column:
    missing, rows = len(counts) > len(present), sum(present.values())
    if len(present) == 1 and not missing:
        raise Skip("the same in every training row")
    if len(present) > 10 and len(present) >= _IDENTIFIER * rows:
        raise Skip("a different text in (almost) every row: an identifier, or prose")
    levels = tuple(sorted(present, key=lambda text: (-present[text], text)))
    return Column(name, "category" if len(levels) <= MOST_LEVELS else "index", missing=missing, levels=levels)


def _texts(values: np.ndarray) -> np.ndarray:
    """A column as text, as in training, also where all cells of a file happen to be numbers."""
    if values.dtype.kind == "O":
        return values
    if values.dtype.kind == "M":
        return np.array(["" if np.isnat(value) else str(value) for value in values], object)
    return np.array(["" if value != value else repr(value).removesuffix(".0") for value in values.tolist()], object)


def _some(texts: Iterable[str], most: int = 4) -> str:
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(repr(text[:40]) for text in texts[:most]) + more
