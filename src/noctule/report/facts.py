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
