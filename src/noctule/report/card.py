"""`FILE.card.html`: what was measured of a file that ships, as one page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from noctule.report import files
from noctule.report.html import templates
from noctule.report.palette import COLORS, COLORS_DARK, INK, INK_DARK, variables
from noctule.report.tables import Row, Table, value_cell
from noctule.report.units import duration, energy, percent, size


def write_card(card: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a card, as `Card.as_dict` gives it, and return its path."""
    name = Path(card["file"]).name
    batches = [batch for batch in card["batches"] if "error" not in batch]
    first = f", {duration(batches[0]['p50_ms'] / 1e3)} a sample" if batches else ""
    right = "" if card["accuracy"] is None else f", {percent(card['accuracy'])} of the samples right"
    failed = [(f"batch {b['batch']}", b["error"]) for b in card["batches"] if "error" in b]
    text = (
        templates()
        .get_template("card.html")
        .render(
            title=f"{name} for {card['to']}",
            headline=f"{size(card['bytes'])}{first}{right}",
            facts=[
                card["precision"] or "precision not known",
                f"{card['threads']} thread(s)",
                card["machine"].get("cpu", ""),
                *card["flags"],
                *(f"{library} {version}" for library, version in card["versions"].items()),
            ],
            light=Markup(variables(INK, COLORS)),
            dark=Markup(variables(INK_DARK, COLORS_DARK)),
            calls=_calls(batches),
            calls_note=f"Memory is the peak over a process with numpy alone. Energy is {card['energy']}.",
            file=_file(card),
            notes=[*(("in another way", note) for note in card["fell_back"]), *failed],
        )
    )
    files.replace(path, text.encode())
    return path


def _calls(batches: list[Mapping[str, Any]]) -> Table:
    rows = []
    for batch in batches:
        times = [duration(batch[p] / 1e3) for p in ("p50_ms", "p90_ms", "p99_ms")]
        more = [size(batch["memory_bytes"]), energy(batch["joules"])]
        rows.append(Row(str(batch["batch"]), [value_cell(words) for words in (*times, *more)]))
    heads = ("Samples of a call", "Median", "90th percentile", "99th", "Memory", "Energy of a sample")
    return Table("Calls, in a process of their own", heads, rows)


def _file(card: Mapping[str, Any]) -> Table:
    ratio = card["accuracy_ratio"]
    lines = {
        "Bytes": size(card["bytes"]),
        "Deflated": size(card["deflated_bytes"]),
        "Import of the runtime": duration(card["import_seconds"]),
        "Load of the file": duration(card["load_seconds"]),
        "Accuracy": percent(card["accuracy"]),
        "Accuracy over the source's": percent(ratio),
        "Predictions equal to the source's": percent(card["equal_predictions"]),
        "Fastest precision here": card["fastest_precision"] or "",
        "Process needs torch": "yes" if card["torch_loaded"] else "no",
    }
    return Table(
        "Its bytes and its answers",
        ("", ""),
        [Row(name, [value_cell(words)]) for name, words in lines.items() if words],
    )
