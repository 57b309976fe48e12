"""Read numbers out of records and summaries that may lack them or hold something else."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

BASELINE = "dense"
"""The series that the others are measured against."""

_LARGEST = 1e100  # what is beyond it exploded, what is below its inverse is nothing: neither is drawn nor divided by


def number(record: object, *keys: str) -> float | None:
    """The number at `keys` inside nested mappings; None when it is missing, no number, or not finite.

    >>> number({"layers": {"0": {"weights": 7}}}, "layers", "0", "weights")
    7
    """
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    if isinstance(record, bool) or not isinstance(record, int | float):
        return None
    if not math.isfinite(record) or abs(record) > _LARGEST:
        return None
    return 0 if abs(record) < 1 / _LARGEST else record


def mapping(record: object, key: str) -> dict[str, Any]:
    """The mapping at `key`; empty when it is missing or something else."""
    value = record.get(key) if isinstance(record, Mapping) else None
    return {str(name): item for name, item in value.items()} if isinstance(value, Mapping) else {}


def baseline_last(names: Sequence[str]) -> list[str]:
    """`names` once each, in their order but for the baseline, which ends the list."""
    return sorted(dict.fromkeys(names), key=lambda name: name == BASELINE)


def outcomes(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The finished series of a summary, the baseline last."""
    series = mapping(summary, "series")
    return {name: series[name] for name in baseline_last(list(series)) if isinstance(series[name], Mapping)}


def by_series(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each series, the baseline last; a record without a series belongs to "run"."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(str(record.get("series") or "run"), []).append(record)
    return {name: groups[name] for name in baseline_last(list(groups))}


def training_bytes(outcome: Mapping[str, Any]) -> float | None:
    """Weights, their indices, gradients and optimizer state together; None when one of them is unknown."""
    parts = [number(outcome, f"{part}_bytes") for part in ("weights", "index", "gradient", "optimizer")]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def accuracy_margin(accuracy: float, samples: float) -> float:
    """Half of Wilson's 95 % interval of an accuracy measured on `samples`: what the draw of the test set explains."""
    z = 1.96
    spread = accuracy * (1 - accuracy) / samples + (z / (2 * samples)) ** 2
    return z * math.sqrt(max(0.0, spread)) / (1 + z**2 / samples)


def apart(summary: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """How many points a series is more accurate than the baseline, and half of the 95 % interval of that.

    Sample by sample where the summary says so, else as if each had a test set of its own; None where their size is unknown.
    """
    own, twin = (outcomes(summary).get(series, {}) for series in (name, BASELINE))
    mine, theirs = number(own, "test_accuracy"), number(twin, "test_accuracy")
    if mine is None or theirs is None or not (0 <= mine <= 1 and 0 <= theirs <= 1):
        return None
    paired = mapping(summary, "difference")
    points, margin = number(paired, "points"), number(paired, "margin_points")
    if name == "sparse" and points is not None and margin is not None:
        return points, margin
    samples = number(mapping(summary, "data"), "test")
    if not samples or samples < 1:
        return None
    return 100 * (mine - theirs), 100 * math.hypot(accuracy_margin(mine, samples), accuracy_margin(theirs, samples))


def best_validation(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest validation accuracy of any record; R2 where a number is predicted."""
    scores = [score(record, "validation") for record in records]
    return max((found for found in scores if found is not None), default=None)


def score(record: object, part: str) -> float | None:
    """The accuracy on a part of the data; R2 where a number is predicted."""
    found = number(record, f"{part}_r2")
    return number(record, f"{part}_accuracy") if found is None else found


def predicts_numbers(records: Sequence[object]) -> bool:
    """Whether these records, or outcomes, are of a regression."""
    return any(number(record, f"{part}_r2") is not None for record in records for part in ("validation", "test"))
