"""`report.html`: one page about one run that needs nothing but itself."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from noctule.report import files
from noctule.report.curves import learning, structure
from noctule.report.facts import mapping, number
from noctule.report.folder import RunFolder
from noctule.report.footprint import footprint
from noctule.report.headline import headline
from noctule.report.markup import text
from noctule.report.provenance import provenance
from noctule.report.style import SCRIPT, STYLE


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` into the run's folder, in one step, from whatever the run has recorded by now."""
    path = folder.path / "report.html"
    files.replace(path, page(folder.about(), folder.metrics(), folder.summary()).encode())
    return path


def page(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The whole page: it is complete without its script, and its policy forbids the browser any request."""
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
<p class="facts">{_facts(about)}</p>
</header>
<main>
{_learning(records)}
{_structure(records)}
<section><h2>Footprint</h2>{footprint(summary)}</section>
<section><h2>How this was measured</h2>{provenance(about, summary)}</section>
</main>
<footer>Written by Noctule from run.json, metrics.jsonl and summary.json beside this page.</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _facts(about: Mapping[str, Any]) -> str:
    seed, threads, cpu = about.get("seed"), number(about, "threads"), mapping(about, "machine").get("cpu")
    facts = [
        f"seed {seed}" if seed is not None else None,
        f"{threads} thread{'' if threads == 1 else 's'}" if threads is not None else None,
        cpu,
        str(about.get("started") or "")[:10] or None,
    ]
    return "".join(f"<span>{text(fact)}</span>" for fact in facts if fact)


def _learning(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "<section><h2>Learning</h2><p>No epoch finished yet, so there is nothing to draw.</p></section>"
    lost = sum(
        key in record and number(record, key) is None for record in records for key in ("train_loss", "validation_loss")
    )
    notes = ["Time is the time spent training; validation is not in it."]
    if lost:
        notes.append(f"{lost} recorded losses were not finite: the curves have gaps there.")
    charts = "\n".join(learning(records))
    return f'<section><h2>Learning</h2><div class="grid2">{charts}</div><p class="note">{" ".join(notes)}</p></section>'


def _structure(records: Sequence[Mapping[str, Any]]) -> str:
    charts = "\n".join(structure(records))
    return f'<section><h2>Connections</h2><div class="grid2">{charts}</div></section>' if charts else ""
