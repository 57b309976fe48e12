"""The outcome of a run in one honest sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from noctule.report.facts import (
    BASELINE,
    best_validation,
    by_series,
    number,
    outcomes,
    predicts_numbers,
    score,
    training_bytes,
)
from noctule.report.units import GAP, count, duration, percent, r2, ratio, size


def headline(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """What came out, gains and costs alike; of an unfinished run how far it got."""
    finished = outcomes(summary)
    if not finished:
        return _unfinished(records)
    name = "sparse" if "sparse" in finished else next(iter(finished))
    if name == BASELINE or BASELINE not in finished:
        return _alone(name, finished[name])
    return _against_baseline(name, finished[name], finished[BASELINE])


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
        parts.append(f"{size(stored)} of training memory")
    return _capital(_accuracy(name, outcome) + (f", with {_listed(parts)}." if parts else "."))


def _against_baseline(name: str, outcome: Mapping[str, Any], twin: Mapping[str, Any]) -> str:
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
        (training_bytes(outcome), training_bytes(twin), "training memory"),
    ):
        if not mine or not theirs:
            continue
        if 0.95 < theirs / mine < 1.05:
            gains.append(f"about the same {what}")
        elif theirs > mine:
            gains.append(f"{ratio(theirs / mine)} less {what}")
        else:
            costs.append(f"{ratio(mine / theirs)} the {what}")
    sentence = _accuracy(name, outcome) + _difference(outcome, twin)
    if gains:
        sentence += f", with {_listed(gains)}"
    if costs:
        sentence += f", {'but' if gains else 'and'} it takes {_listed(costs)}"
    return _capital(sentence + ".")


def _accuracy(name: str, outcome: Mapping[str, Any]) -> str:
    found, of_score = score(outcome, "test"), r2 if predicts_numbers([outcome]) else percent
    return f"{name}: " + ("test accuracy not available" if found is None else f"{of_score(found)} on the test set")


def _difference(outcome: Mapping[str, Any], twin: Mapping[str, Any]) -> str:
    mine, theirs = score(outcome, "test"), score(twin, "test")
    if mine is None or theirs is None:
        return " (no test accuracy of the dense twin)" if mine is not None else ""
    if predicts_numbers([outcome]):
        away = f"{abs(mine - theirs):.3f}"
        return (
            f", {away} {'above' if mine > theirs else 'below'} its dense twin"
            if float(away)
            else ", level with its dense twin"
        )
    points = round(100 * (mine - theirs), 1)
    if points == 0:
        return ", level with its dense twin"
    return f", {abs(points)}{GAP}points {'above' if points > 0 else 'below'} its dense twin"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
