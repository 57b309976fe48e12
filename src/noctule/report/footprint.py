"""The table of what each series reached and what it cost, beside the dense baseline."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from noctule.report.facts import BASELINE, mapping, number, outcomes, predicts_numbers, training_bytes
from noctule.report.markup import text
from noctule.report.units import GAP, MINUS, MISSING, TIMES, count, duration, energy, ratio, size

Outcome = Mapping[str, Any]
_NO_CELL = '<td class="none"></td>'


def footprint(summary: Outcome) -> str:
    """The table as HTML; a sentence when no series has finished."""
    series = outcomes(summary)
    if not series:
        return "<p>The table of results and costs is written when the run has finished.</p>"
    dense = series.get(BASELINE)
    others = [own for own in series.values() if own is not dense] if dense is not None else []
    rows = []
    scores = _OF_NUMBERS if predicts_numbers(list(series.values())) else {"Test accuracy": _accuracy}
    epoch = (
        "Best epoch, by validation"
        if number(mapping(summary, "data"), "validation") != 0
        else "Last epoch, no validation"
    )
    for label, show in {**scores, "Test loss": _loss, epoch: _best_epoch}.items():
        first = show is _accuracy
        beside = [_points(own, dense) if first else _NO_CELL for own in others]
        rows.append(_row(label, [show(own) for own in series.values()], beside, "total" if first else ""))
    for label, kind, get, show in _COSTS:
        beside = [_ratio(get(dense), get(own)) for own in others] if dense is not None else []
        rows.append(_row(label, [show(get(own)) for own in series.values()], beside, kind))
    heads = [*series, *(f"dense / {name}" for name in series if name != BASELINE and others)]
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in ("Measure", *heads))
    caption = "Results and costs of each series" + (", beside the dense baseline" if others else "")
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="note">{" ".join(_notes(summary, compared=bool(others)))}</p>'
    )


def accuracy_margin(accuracy: float, samples: float) -> float:
    """Half of Wilson's 95 % interval of an accuracy measured on `samples`: what the draw of the test set explains."""
    z = 1.96
    spread = accuracy * (1 - accuracy) / samples + (z / (2 * samples)) ** 2
    return z * math.sqrt(max(0.0, spread)) / (1 + z**2 / samples)


def _key(name: str) -> Callable[[Outcome], float | None]:
    return lambda outcome: number(outcome, name)


_COSTS: tuple[tuple[str, str, Callable[[Outcome], float | None], Callable[[float | None], str]], ...] = (
    ("Parameters", "", _key("parameters"), count),
    ("Training memory, total", "total", training_bytes, size),
    ("weights", "part", _key("weights_bytes"), size),
    ("indices", "part", _key("index_bytes"), size),
    ("gradients", "part", _key("gradient_bytes"), size),
    ("optimizer state", "part", _key("optimizer_bytes"), size),
    ("Peak memory of the process", "", _key("peak_memory_bytes"), size),
    ("Multiply-adds per sample", "", _key("multiply_adds_per_sample"), count),
    ("Time per epoch, median", "total", _key("seconds_per_epoch"), duration),
    ("Time for the whole training", "", _key("seconds"), duration),
    ("Energy", "", _key("joules"), energy),
)


def _row(label: str, values: Sequence[str], beside: Sequence[str], kind: str) -> str:
    cells = "".join(f"<td{' class=none' if value == MISSING else ''}>{text(value)}</td>" for value in values)
    return f'<tr class="{kind}"><th scope="row">{label}</th>{cells}{"".join(beside)}</tr>'


def _ratio(dense: float | None, own: float | None) -> str:
    if not dense or not own:
        return _NO_CELL
    return f"<td{' class=worse' if dense < own else ''}>{ratio(dense / own)}</td>"


def _points(own: Outcome, dense: Outcome | None) -> str:
    mine, theirs = number(own, "test_accuracy"), number(dense, "test_accuracy")
    if mine is None or theirs is None:
        return _NO_CELL
    points = round(100 * (mine - theirs), 2)
    sign = "+" if points > 0 else MINUS if points < 0 else ""
    return f'<td class="points">{sign}{abs(points):.2f} points</td>'


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
"""What is said of a regression in place of the accuracy; errors are in the unit of the target."""


def _best_epoch(own: Outcome) -> str:
    best, epochs = number(own, "best_epoch"), number(own, "epochs")
    return count(best) if best is None or epochs is None else f"{count(best)} of {count(epochs)}"


def _notes(summary: Outcome, *, compared: bool) -> list[str]:
    notes = [
        "Training memory is what is stored from step to step; activations come on top, and are in the peak. "
        "Multiply-adds count the forward pass and both gradients."
    ]
    if compared:
        notes.append(f"Above 1{TIMES}, dense needs that many times as much; points are the difference from dense.")
    samples = number(mapping(summary, "data"), "test")
    scores = [number(own, "test_accuracy") for own in outcomes(summary).values()]
    margins = [accuracy_margin(score, samples) for score in scores if samples and score is not None and 0 <= score <= 1]
    if samples and margins:
        notes.append(
            f"On {count(samples)} test samples an accuracy is known to about ±{100 * max(margins):.1f}{GAP}points "
            f"(95{GAP}% interval of one seed)."
        )
    return notes
