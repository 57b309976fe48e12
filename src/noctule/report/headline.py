"""The outcome of a run in one honest sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from noctule.report.facts import (
    BASELINE,
    apart,
    best_validation,
    by_series,
    number,
    outcomes,
    predicts_numbers,
    score,
    training_bytes,
)
from noctule.report.units import GAP, count, duration, percent, r2, ratio, signed, size

STORED = "memory for weights, gradients and optimizer state"
"""What `training_bytes` adds up, indices included."""


def headline(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The results of a run, gains and costs alike; of an unfinished run its progress."""
    finished = outcomes(summary)
    if not finished:
        return _unfinished(records)
    name = "sparse" if "sparse" in finished else next(iter(finished))
    if name == BASELINE or BASELINE not in finished:
        return _alone(name, finished[name])
    return _against_baseline(name, finished[name], finished[BASELINE], apart(summary, name))


def _unfinished(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "No epoch finished yet."
    parts = []
    for name, own in by_series(records).items():
        best = best_validation(own)
        of_score = r2 if predicts_numbers(own) else percent
        reached = "no validation accuracy yet" if best is None else f"{of_score(best)} on the validation set at best"
        epoch = number(own[-1], "epoch")
        parts.append(f"{name} {f'after epoch {epoch:.0f}' if epoch is not None else 'so far'}: {reached}")
    return f"Not finished. {_capital('; '.join(parts))}."


def _alone(name: str, outcome: Mapping[str, Any]) -> str:
    parts = []
    if (parameters := number(outcome, "parameters")) is not None:
        parts.append(f"{count(parameters)} parameters")
    if (seconds := number(outcome, "seconds_per_epoch")) is not None:
        parts.append(f"{duration(seconds)} per epoch")
    if (stored := training_bytes(outcome)) is not None:
        parts.append(f"{size(stored)} of {STORED}")
    return _capital(_accuracy(name, outcome) + (f", with {_listed(parts)}." if parts else "."))


def _against_baseline(
    name: str, outcome: Mapping[str, Any], twin: Mapping[str, Any], apart: tuple[float, float] | None
) -> str:
    gains, costs = [], []
    mine, theirs = number(outcome, "parameters"), number(twin, "parameters")
    if mine is not None and theirs:
        if mine == theirs:
            gains.append("as many parameters")
        elif mine < theirs:
            gains.append(f"{percent(mine / theirs)} of its parameters")
        else:
            costs.append(f"{ratio(mine / theirs)} its parameters")
    for mine, theirs, what in (
        (number(outcome, "seconds_per_epoch"), number(twin, "seconds_per_epoch"), "time per epoch"),
        (training_bytes(outcome), training_bytes(twin), STORED),
    ):
        if not mine or not theirs:
            continue
        if 0.95 < theirs / mine < 1.05:
            gains.append(f"about the same {what}")
        elif theirs > mine:
            gains.append(f"{ratio(theirs / mine)} less {what}")
        else:
            costs.append(f"{ratio(mine / theirs)} the {what}")
    sentence = _accuracy(name, outcome) + _difference(outcome, twin, apart)
    if gains:
        sentence += f", with {_listed(gains)}"
    if costs:
        sentence += f", {'but' if gains else 'and'} it takes {_listed(costs)}"
    return _capital(sentence + ".")


def _accuracy(name: str, outcome: Mapping[str, Any]) -> str:
    found, of_score = score(outcome, "test"), r2 if predicts_numbers([outcome]) else percent
    return f"{name}: " + ("test accuracy not available" if found is None else f"{of_score(found)} on the test set")


def _difference(outcome: Mapping[str, Any], twin: Mapping[str, Any], apart: tuple[float, float] | None) -> str:
    mine, theirs = score(outcome, "test"), score(twin, "test")
    if mine is None or theirs is None:
        return " (no test accuracy of the dense twin)" if mine is not None else ""
    way = f" in {twin['way']}" if isinstance(twin.get("way"), str) else ""
    if predicts_numbers([outcome]):
        return f" against {r2(theirs)} of its dense twin{way} ({signed(mine - theirs, 3)})"
    against = f" against {percent(theirs)} of its dense twin{way}"
    if apart is None:
        return f"{against} ({signed(100 * (mine - theirs), 1)}{GAP}points)"
    points, margin = apart
    said = f"{signed(points, 1)}{GAP}±{GAP}{margin:.1f}{GAP}points"
    return f"{against} ({'no difference: ' if abs(points) <= margin else ''}{said})"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
