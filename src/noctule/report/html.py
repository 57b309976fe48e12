"""`report.html`: one page about one run that needs nothing but itself."""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from noctule.core.errors import DataError
from noctule.report import files
from noctule.report.curves import learning, structure
from noctule.report.facts import mapping, number, outcomes
from noctule.report.folder import RunFolder
from noctule.report.footprint import footprint, footprint_notes
from noctule.report.headline import headline
from noctule.report.palette import COLORS, COLORS_DARK, INK, INK_DARK, variables
from noctule.report.provenance import provenance
from noctule.report.together import Workers, everyone, how, how_many, together
from noctule.report.units import count, duration


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` into the run's folder, in one step, from whatever the run has recorded by now."""
    path = folder.path / "report.html"
    written = page(folder.about(), folder.metrics(), folder.summary(), others=_others(folder))
    files.replace(path, written.encode())
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
    script = (TEMPLATES / "script.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        templates()
        .get_template("page.html")
        .render(
            title=f"{recipe} on {name}" if name else recipe,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
            light=Markup(variables(INK, COLORS)),
            dark=Markup(variables(INK_DARK, COLORS_DARK)),
            script=Markup(script),
            headline=headline(summary, records),
            facts=_facts(about, records),
            learning=learning(records) if records else [],
            learning_notes=_learning_notes(about, records),
            together=together(everyone(about, records, others or {})),
            structure=structure(records),
            footprint=footprint(summary),
            footprint_notes=footprint_notes(summary),
            paces=_paces(summary, workers) if (workers := how_many(about, records)) > 1 else [],
            each_worker=_each_worker(workers) if workers > 1 and outcomes(summary) else "",
            repeated=provenance(about, summary, records),
        )
    )


TEMPLATES = Path(__file__).parent / "templates"

# Control characters, lone surrogates and non-characters: HTML has no way to hold them.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@functools.cache
def templates() -> Environment:
    """The templates of the page; every value is escaped unless it is Markup."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else _UNFIT.sub("\ufffd", str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def _others(folder: RunFolder) -> dict[int, list[dict[str, Any]]]:
    """The records of the other workers; unreadable records count as none."""
    found = {}
    for other in folder.workers()[1:]:
        try:
            found[int(other.path.name)] = other.metrics()
        except (DataError, OSError):
            found[int(other.path.name)] = []
    return found


def _facts(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
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
    return [str(fact) for fact in facts if fact]


def _learning_notes(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
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
    return " ".join(notes)


def _each_worker(workers: int) -> str:
    """How to read the table of one process where there were several workers."""
    return (
        f"Memory is that of one of the {count(workers)} workers, of which each needs as much. Multiply-adds are "
        "those of one sample, which one worker takes. Times are those of all workers together, energy that of this machine."
    )


def _paces(summary: Mapping[str, Any], workers: int) -> list[str]:
    """The workers beside one process with all of their threads, a sentence for each series."""
    said = []
    for name, own in outcomes(summary).items():
        took, alone, threads = (
            number(own, key) for key in ("seconds_per_epoch", "alone_seconds_per_epoch", "alone_threads")
        )
        if took is not None and alone is not None and threads is not None:
            faster = "without --workers it is faster here" if alone < took else "the workers are faster here"
            said.append(
                f"{name[:1].upper()}{name[1:]}: {count(workers)} workers took {duration(took)} an epoch; one process with "
                f"{count(threads)} threads takes about {duration(alone)}, as measured over some steps: {faster}."
            )
    return said
