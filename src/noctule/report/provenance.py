"""How a run was measured and how to repeat it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noctule.report.facts import mapping, number
from noctule.report.together import how, how_many
from noctule.report.units import count


@dataclass(frozen=True)
class Provenance:
    """How to repeat a run, and everything that was recorded about it."""

    command: Sequence[str]
    """The words of the command line, quoted for a shell."""
    under: str
    """The launcher that the command needs, in words; empty where it needs none."""
    entries: Mapping[str, Any]
    """Facts by their names; None is not recorded."""
    options: Sequence[str]


def provenance(
    about: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]] = ()
) -> Provenance:
    """Find what `run.json`, the summary and the records say about how a run was made."""
    machine, versions = mapping(about, "machine"), mapping(about, "versions")
    entries = {
        "Recipe": about.get("recipe"),
        "Data": data(summary),
        "Seed": about.get("seed"),
        **({"Workers": ", ".join(team)} if (team := how(about, records)) else {}),
        "Threads": about.get("threads"),
        "Instruction set": about.get("instruction_set"),
        "Processor": machine.get("cpu"),
        "Cores": machine.get("cores"),
        "System": machine.get("system"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
        "Started": str(about.get("started") or "").replace("T", " ") or None,
    }
    several = how_many(about, records)
    under = f", by torchrun with {several} workers" if several and "workers" not in mapping(about, "together") else ""
    options = [f"{name} = {_value(value)}" for name, value in mapping(about, "options").items()]
    return Provenance([shlex.quote(word) for word in command(about)], under, entries, options)


def command(about: Mapping[str, Any]) -> list[str]:
    """The words of the command line that was typed, or of an equivalent command line.

    >>> " ".join(command({"recipe": "sparse_mlp", "options": {"hidden": [300, 100], "rewire": False}, "seed": 3}))
    'noctule run sparse_mlp --hidden 300,100 --no-rewire --seed 3'
    """
    typed = about.get("command")
    if isinstance(typed, list) and typed:
        return [str(word) for word in typed]
    words = ["noctule", "run", str(about.get("recipe") or "RECIPE")]
    options = mapping(about, "options")
    if about.get("seed") is not None:
        options.setdefault("seed", about["seed"])
    for name, value in (options | mapping(about, "together")).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", _value(value)]
    return words


def data(summary: Mapping[str, Any]) -> str | None:
    """The data set and its sizes in words; None when the summary does not name one."""
    about = mapping(summary, "data")
    parts = [f"{count(size)} {what}" for what in ("features", "classes") if (size := number(about, what)) is not None]
    if about.get("target"):
        parts = [f"{count(number(about, 'features') or 0)} features", f"target {about['target']}"]
        labels = about.get("labels")
        parts.append(f"classes {_labels(labels)}" if isinstance(labels, list) else "a number: regression")
    for part in ("train", "validation", "test"):
        if (samples := number(about, part)) is not None:
            parts.append(f"{count(samples)} {part} samples")
    words = ([str(about["name"])] if about.get("name") else []) + parts
    return ", ".join(words) or None


def _labels(labels: list[Any]) -> str:
    """The names of the classes in the order of their numbers."""
    more = f" and {len(labels) - 20} more" if len(labels) > 20 else ""
    return " / ".join(str(label) for label in labels[:20]) + more


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
