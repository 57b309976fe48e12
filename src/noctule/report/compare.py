"""Runs side by side as plain text for a terminal."""

from collections.abc import Sequence

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
from noctule.report.folder import RunFolder
from noctule.report.together import how
from noctule.report.units import GAP, count, duration, percent, r2, size

_HEADS = ("run", "series", "accuracy", "parameters", "stored", "time per epoch")


def compare_table(folders: Sequence[RunFolder]) -> str:
    """A line per run and series: accuracy or R2 on the test set (on validation while unfinished), weights, bytes, seconds.

    Stored are weights, indices, gradients and optimizer state; a dense twin says in which way it was trained.

    Of a run by several workers the bytes are those of one of them.
    """
    rows = [row for folder, name in zip(folders, _names(folders), strict=True) for row in _rows(folder, name)]
    table = [_HEADS, *(tuple(map(_printable, row)) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADS))]
    lines = [_line(row, widths) for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _rows(folder: RunFolder, run: str) -> list[tuple[str, ...]]:
    records = folder.metrics()
    finished, started = outcomes(folder.summary()), by_series(records)
    run, rows = ", ".join([run, *how(folder.about(), records)]), []
    of_score = r2 if predicts_numbers([*records, *finished.values()]) else percent
    for name in dict.fromkeys([*started, *finished]):
        own = finished.get(name)
        if own is None:
            best = best_validation(started[name])
            rows.append((run, name, "-" if best is None else f"{of_score(best)} (validation)", "-", "-", "-"))
            continue
        show = (
            (of_score, score(own, "test")),
            (count, number(own, "parameters")),
            (size, training_bytes(own)),
            (duration, number(own, "seconds_per_epoch")),
        )
        way = f", {own['way']}" if name == BASELINE and isinstance(own.get("way"), str) else ""
        rows.append((run, name + way, *("-" if value is None else words(value) for words, value in show)))
    return rows or [(run, "-", "no epoch yet", "-", "-", "-")]


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """The last parts of the paths; whole paths where two last parts are the same."""
    short = [folder.path.name or str(folder.path) for folder in folders]
    return [str(f.path) if short.count(name) > 1 else name for f, name in zip(folders, short, strict=True)]


def _printable(cell: str) -> str:
    cell = cell.replace(GAP, " ").replace("R²", "R2")
    return "".join(character if character.isprintable() else "?" for character in cell)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths[:2], strict=True)]
    cells += [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(cells).rstrip()
