"""The table of results and costs of each series, beside the dense baseline."""

from collections.abc import Callable, Mapping
from typing import Any

from noctule.report.facts import (
    BASELINE,
    accuracy_margin,
    apart,
    mapping,
    number,
    outcomes,
    predicts_numbers,
    training_bytes,
)
from noctule.report.tables import EMPTY, Cell, Row, Table, value_cell
from noctule.report.units import GAP, MISSING, TIMES, count, duration, energy, ratio, signed, size

Outcome = Mapping[str, Any]


def footprint(summary: Outcome) -> Table | None:
    """The table; None when no series has finished."""
    series = outcomes(summary)
    if not series:
        return None
    dense, others = series.get(BASELINE), _compared(series)
    rows = []
    scores = _OF_NUMBERS if predicts_numbers(list(series.values())) else {"Test accuracy": _accuracy}
    epoch = (
        "Best epoch, by validation"
        if number(mapping(summary, "data"), "validation") != 0
        else "Last epoch, no validation"
    )
    for label, show in {**scores, "Test loss": _loss, epoch: _best_epoch}.items():
        first = show is _accuracy
        beside = [_points(summary, name, own, dense) if first else EMPTY for name, own in others.items()]
        cells = [value_cell(show(own)) for own in series.values()]
        rows.append(Row(label, cells + beside, "total" if first else ""))
    for label, kind, get, show in _COSTS:
        beside = [EMPTY if "whole" in kind else _ratio(get(dense or {}), get(own)) for own in others.values()]
        rows.append(Row(label, [value_cell(show(get(own))) for own in series.values()] + beside, kind))
    heads = ["Measure", *series, *(f"dense / {name}" for name in others)]
    caption = "Results and costs of each series" + (", beside the dense baseline" if others else "")
    return Table(caption, heads, rows)


def _compared(series: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """The series that are measured against the baseline; none without one."""
    return {name: own for name, own in series.items() if name != BASELINE} if BASELINE in series else {}


def _key(name: str) -> Callable[[Outcome], float | None]:
    return lambda outcome: number(outcome, name)


_COSTS: tuple[tuple[str, str, Callable[[Outcome], float | None], Callable[[float | None], str]], ...] = (
    ("Parameters", "", _key("parameters"), count),
    ("Stored from step to step, total", "total", training_bytes, size),
    ("weights", "part", _key("weights_bytes"), size),
    ("indices", "part", _key("index_bytes"), size),
    ("gradients", "part", _key("gradient_bytes"), size),
    ("optimizer state", "part", _key("optimizer_bytes"), size),
    ("Peak of the whole process", "whole", _key("peak_memory_bytes"), size),
    ("in use before it trained", "part whole", _key("memory_before_bytes"), size),
    ("Multiply-adds per sample", "", _key("multiply_adds_per_sample"), count),
    ("Time per epoch, median", "total", _key("seconds_per_epoch"), duration),
    ("Time for the whole training", "", _key("seconds"), duration),
    ("Energy", "", _key("joules"), energy),
)


def _ratio(dense: float | None, own: float | None) -> Cell:
    if not dense or not own:
        return EMPTY
    return Cell(ratio(dense / own), "worse" if dense < own else "")


def _points(summary: Outcome, name: str, own: Outcome, dense: Outcome | None) -> Cell:
    mine, theirs = number(own, "test_accuracy"), number(dense, "test_accuracy")
    if mine is None or theirs is None:
        return EMPTY
    found = apart(summary, name)
    points, margin = found or (100 * (mine - theirs), None)
    words = signed(points, 2) + ("" if margin is None else f" ±{GAP}{margin:.2f}") + f"{GAP}points"
    return Cell(words, "points")


def _accuracy(own: Outcome) -> str:
    accuracy = number(own, "test_accuracy")
    return MISSING if accuracy is None else f"{100 * accuracy:.2f}{GAP}%"


def _loss(own: Outcome) -> str:
    loss = number(own, "test_loss")
    return MISSING if loss is None else f"{loss:.4g}"


def _r2(own: Outcome) -> str:
    return MISSING if (value := number(own, "test_r2")) is None else f"{value:.4f}"


def _of(key: str) -> Callable[[Outcome], str]:
    return lambda own: MISSING if (value := number(own, key)) is None else f"{value:.5g}"


_OF_NUMBERS: dict[str, Callable[[Outcome], str]] = {
    "Test R²": _r2,
    "Test error, root mean square": _of("test_rmse"),
    "Test error, mean absolute": _of("test_mae"),
}
"""The rows of a regression in place of the accuracy; errors are in the unit of the target."""


def _best_epoch(own: Outcome) -> str:
    best, epochs = number(own, "best_epoch"), number(own, "epochs")
    return count(best) if best is None or epochs is None else f"{count(best)} of {count(epochs)}"


def _twin(dense: Outcome) -> list[str]:
    """How the dense twin was trained, and which other ways were timed."""
    way, ways = dense.get("way"), mapping(dense, "ways_seconds")
    if not isinstance(way, str):
        return []
    tried = ", ".join(f"{name} {duration(taken)}" for name in ways if (taken := number(ways, name)) is not None)
    if not tried:
        return [f"Dense was trained in {way}; which way is the fastest here was not measured."]
    return [f"Dense was trained in {way}, the fastest way here (forward and backward of a step: {tried})."]


def footprint_notes(summary: Outcome) -> str:
    """What to know about the figures of the table."""
    notes = [
        "Stored from step to step are weights, indices, gradients and optimizer state, counted tensor by tensor. The peak is the "
        "most memory that the process had at once: that, activations, and all that was there before (Python, torch, the data, and "
        "what an earlier series left), so the peaks of two series do not compare. "
        "Multiply-adds count the forward pass and both gradients."
    ]
    if _compared(outcomes(summary)):
        notes.append(f"Above 1{TIMES}, dense needs that many times as much; points are the difference from dense.")
        notes.extend(_twin(outcomes(summary)[BASELINE]))
        if mapping(summary, "difference"):
            notes.append(f"Points are given with half of their 95{GAP}% interval, the test samples paired.")
    samples = number(mapping(summary, "data"), "test")
    scores = [number(own, "test_accuracy") for own in outcomes(summary).values()]
    margins = [accuracy_margin(score, samples) for score in scores if samples and score is not None and 0 <= score <= 1]
    if samples and margins:
        notes.append(
            f"On {count(samples)} test samples an accuracy is known to about ±{100 * max(margins):.1f}{GAP}points "
            f"(95{GAP}% interval of one seed)."
        )
    return " ".join(notes)
