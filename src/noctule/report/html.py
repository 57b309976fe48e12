"""`report.html`: one page about one run that needs nothing but itself."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from noctule.core.errors import DataError
from noctule.report import files
from noctule.report.curves import learning, structure
from noctule.report.facts import mapping, number, outcomes
from noctule.report.folder import RunFolder
from noctule.report.footprint import footprint
from noctule.report.headline import headline
from noctule.report.markup import text
from noctule.report.provenance import provenance
from noctule.report.style import SCRIPT, STYLE
from noctule.report.together import Workers, everyone, how, how_many, together
from noctule.report.units import count, duration


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` into the run's folder, in one step, from whatever the run has recorded by now."""
    path = folder.path / "report.html"
    written = page(folder.about(), folder.metrics(), folder.summary(), others=_others(folder))
    files.replace(
        path, written.encode(errors="surrogateescape")
    )  # a path's bytes, where the locale knew no letters for them
    return path


def page(
    about: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    *,
    others: Workers | None = None,
) -> str:
    """The whole page: it is complete without its script, and its policy forbids the browser any request.

    Args:
        others: records of the other workers of a run, by their numbers.
    """
    recipe, name = str(about.get("recipe") or "run"), mapping(summary, "data").get("name")
    title = f"{recipe} on {name}" if name else recipe
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{script}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)} · Noctule</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kind">{text(title)}</p>
<h1>{text(headline(summary, records))}</h1>
<p class="facts">{_facts(about, records)}</p>
</header>
<main>
{_learning(about, records)}
{_together(everyone(about, records, others or {}))}
{_structure(records)}
<section><h2>Footprint</h2>{footprint(summary)}{_each(about, records, summary)}</section>
<section><h2>How this was measured</h2>{provenance(about, summary, records)}</section>
</main>
<footer>Written by Noctule from run.json, metrics.jsonl and summary.json beside this page.</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _others(folder: RunFolder) -> dict[int, list[dict[str, Any]]]:
    """What the workers in the folder wrote; one whose records cannot be read is as one that has none."""
    found = {}
    for other in folder.workers()[1:]:
        try:
            found[int(other.path.name)] = other.metrics()
        except (DataError, OSError):
            found[int(other.path.name)] = []
    return found


def _facts(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    seed, threads, cpu = about.get("seed"), number(about, "threads"), mapping(about, "machine").get("cpu")
    worker = number(about, "worker")
    team = ", ".join(how(about, records)) or None
    facts = [
        f"worker {worker:.0f} of {team}" if team and worker is not None else team,
        f"seed {seed}" if seed is not None else None,
        f"{threads} thread{'' if threads == 1 else 's'}{' each' if team else ''}" if threads is not None else None,
        cpu,
        str(about.get("started") or "")[:10] or None,
    ]
    return "".join(f"<span>{text(fact)}</span>" for fact in facts if fact)


def _learning(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "<section><h2>Learning</h2><p>No epoch finished yet, so there is nothing to draw.</p></section>"
    lost = sum(
        key in record and number(record, key) is None for record in records for key in ("train_loss", "validation_loss")
    )
    notes = ["Time is the time spent training; validation is not in it."]
    if how_many(about, records) > 1:
        notes = [
            f"What worker {number(about, 'worker') or 0:.0f} saw; its losses of training are those of its own part of the batches. "
            "Time is the time spent training, waiting for others included; validation and forming a new group are not in it."
        ]
    if lost:
        notes.append(f"{lost} recorded losses were not finite: the curves have gaps there.")
    charts = "\n".join(learning(records))
    return f'<section><h2>Learning</h2><div class="grid2">{charts}</div><p class="note">{" ".join(notes)}</p></section>'


def _together(workers: Workers) -> str:
    found = together(workers)
    return f"<section><h2>Workers</h2>{found}</section>" if found else ""


def _each(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """What a table of one process does not say of several."""
    workers = how_many(about, records)
    if workers < 2 or not outcomes(summary):
        return ""
    return _pace(summary, workers) + (
        f'<p class="note">Memory is that of one of the {count(workers)} workers, of which each needs as much. Multiply-adds are '
        "those of one sample, which one worker takes. Times are those of all workers together, energy that of this machine.</p>"
    )


def _pace(summary: Mapping[str, Any], workers: int) -> str:
    """The workers beside one process with all of their threads."""
    said = []
    for name, own in outcomes(summary).items():
        took, alone, threads = (
            number(own, key) for key in ("seconds_per_epoch", "alone_seconds_per_epoch", "alone_threads")
        )
        if took is not None and alone is not None and threads is not None:
            faster = "without --workers it is faster here" if alone < took else "the workers are faster here"
            said.append(
                f"{name}: {count(workers)} workers took {duration(took)} an epoch; one process with {count(threads)} threads takes "
                f"about {duration(alone)}, as measured over some steps: {faster}."
            )
    return "".join(f"<p>{text(words[:1].upper() + words[1:])}</p>" for words in said)


def _structure(records: Sequence[Mapping[str, Any]]) -> str:
    charts = "\n".join(structure(records))
    return f'<section><h2>Connections</h2><div class="grid2">{charts}</div></section>' if charts else ""
