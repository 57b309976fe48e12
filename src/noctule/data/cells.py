"""Parsers of numbers and dates in text cells, and detection of the style of a column."""

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np

PLAIN, DECIMAL_COMMA, THOUSANDS = "plain", "decimal comma", "thousands commas"

_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")
_GROUPS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_WHOLE = re.compile(r"[+-]?\d+")
_EITHER = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
ISO = "ISO 8601"
_TIMES = ("", " %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p")
_DAYS = ("%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%m/%d/%y", "%d/%m/%y", "%d.%m.%y")
_NAMED_DAYS = ("%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y", "%b %Y", "%B %Y", "%Y-%m", "%d-%b-%y")
DATE_FORMATS = (ISO, *(day + time for day in _DAYS for time in _TIMES), *_NAMED_DAYS)
_SCREENED = 20
"""Cells on which every date format is tried before the best one is tried on all."""


def to_number(text: str, style: str = PLAIN) -> float | None:
    """The number in a cell, or None; a currency sign before it and % behind it are ignored.

    >>> to_number("$1,234.50", THOUSANDS), to_number("3,5", DECIMAL_COMMA), to_number("four")
    (1234.5, 3.5, None)
    """
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        bare = _bare(text)
    if style == DECIMAL_COMMA and _COMMA.fullmatch(bare):
        bare = bare.replace(",", ".")
    elif style == THOUSANDS and _GROUPS.fullmatch(bare):
        bare = bare.replace(",", "")
    elif bare == text:
        return None
    try:
        return float(bare)
    except ValueError:
        return None


def number_style(texts: Iterable[str]) -> str | None:
    """The style of commas in these cells; None where two styles are possible (1,234).

    >>> number_style(["1,5", "2"]), number_style(["1,234.5"]), number_style(["1.5"]), number_style(["1,234", "5"])
    ('decimal comma', 'thousands commas', 'plain', None)
    """
    cells = [_bare(text) for text in texts]
    commas = [cell for cell in cells if "," in cell]
    if not commas:
        return PLAIN
    decimal = all(_COMMA.fullmatch(cell) or _WHOLE.fullmatch(cell) for cell in cells)
    grouped = all(_GROUPS.fullmatch(cell) for cell in commas)
    if decimal and not all(_EITHER.fullmatch(cell) for cell in commas):
        return DECIMAL_COMMA
    if grouped:
        return None if decimal else THOUSANDS
    return PLAIN


def date_format(texts: Iterable[str]) -> tuple[str, bool] | None:
    """The date format of most of these cells, and whether day and month could be swapped as well."""
    cells = [text for text in texts if any(map(str.isdigit, text))]
    if not cells or len(cells) < len(list(texts)) / 2:
        return None
    best = max(DATE_FORMATS, key=lambda form: sum(to_date(cell, form) is not None for cell in cells[:_SCREENED]))
    found = {}
    for form in (best, _day_month_swapped(best)):
        found[form] = sum(to_date(cell, form) is not None for cell in cells)
    form = max(found, key=lambda form: found[form])
    if found[form] < max(1, len(cells) / 2):
        return None
    either = _day_month_swapped(form) != form and len(set(found.values())) == 1 and len(found) == 2
    return form, either


def to_date(text: str, form: str) -> float | None:
    """Days since 1970 (in UTC if the cell has a time zone); None where it is no date of this format."""
    try:
        if form == ISO:
            if len(text) < 8 or not any(sign in text for sign in "-:T"):
                return None
            when = datetime.fromisoformat(text)
        else:
            when = datetime.strptime(text, form)
    except ValueError:
        return None
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when
    days = (when - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() / 86_400
    return days if math.isfinite(days) else None


def days_of(values: np.ndarray) -> np.ndarray:
    """Days since 1970 of datetime64 values, NaN for NaT."""
    microseconds = values.astype("datetime64[us]")
    days = microseconds.astype(np.int64) / 86_400e6
    return np.where(np.isnat(microseconds), np.nan, days)


def _day_month_swapped(form: str) -> str:
    day, month = form.find("%d"), form.find("%m")
    if form == ISO or min(day, month) < 0 or form.startswith("%Y") or "." in form:
        return form
    return form.replace("%d", "%_").replace("%m", "%d").replace("%_", "%m")


def _bare(text: str) -> str:
    return text.strip().lstrip("$€£").removesuffix("%").strip()
