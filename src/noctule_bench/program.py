"""What the benchmarks share: the command that starts them, results as lines of JSON, tables at the end."""

import ast
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from noctule.cli.signature import Parser, add_options
from noctule.core.errors import UsageError
from noctule.core.place import nearest

BENCHMARKS = (
    "layers",
    "figure",
    "convolution",
    "codecs",
    "fashion",
    "memory",
    "accuracy",
    "original",
    "rewiring",
    "shrinking",
    "pruning",
    "saved",
    "shipping",
    "distil",
    "smaller",
    "efficient",
    "inference",
    "cpu_blocks",
    "gpu_blocks",
    "bat_brain",
    "transformer",
    "together",
    "asynchronous",
    "link",
    "faults",
)
"""Modules of this package; each has a function of its own name, whose keyword-only parameters are the options."""


def main(words: Sequence[str]) -> int:
    """List the benchmarks, or run the one that the first word names; the exit status.

    Raises:
        UsageError: there is no such benchmark, or it has no such option.
    """
    if not words or words[0] in ("-h", "--help"):
        print("usage: noctule bench NAME [--option value ...]\n")
        for name in BENCHMARKS:
            print(f"  {name:<13} {_summary(name)}")
        print("\nnoctule bench NAME --help lists the options.")
        return 0 if words else 2
    return run(words[0], words[1:])


def run(name: str, words: Sequence[str] = ()) -> int:
    """Run one benchmark with the options of a command line; the exit status.

    Raises:
        UsageError: there is no such benchmark, or it has no such option.
    """
    if name not in BENCHMARKS:
        raise UsageError(
            f"there is no benchmark {name}{nearest(name, BENCHMARKS)}. Benchmarks: {', '.join(BENCHMARKS)}"
        )
    benchmark = getattr(importlib.import_module(f"noctule_bench.{name}"), name)
    parser = Parser(prog=f"noctule bench {name}", allow_abbrev=False, description=_summary(name))
    add_options(parser, benchmark)
    benchmark(**vars(parser.parse_args(list(words))))
    return 0


def _summary(name: str) -> str:
    """The first line of a benchmark's docstring, read from its source: importing it would load torch."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return (ast.get_docstring(function) or "").split("\n")[0]


def chosen(rows: Sequence[str], known: Sequence[str]) -> list[str]:
    """The rows to measure: the given ones, or all."""
    for row in rows:
        if row not in known:
            raise UsageError(f"there is no row {row!r}{nearest(row, known)}. Rows: {', '.join(known)}")
    return [row for row in known if row in rows or not rows]


def at_least_one(**numbers: int) -> None:
    """Refuse counts of which there must be one."""
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


BUSY = 0.5
"""Load average from which others disturb the measuring."""


class Lines:
    """Results as lines of JSON: to stdout at once and, where named, to the end of a file."""

    def __init__(self, out: Path | None) -> None:
        """Find out now whether the file can be written, not after an hour of measuring; warn where the machine is busy."""
        self._out = out
        if (load := os.getloadavg()[0]) > BUSY:
            print(f"warning: the machine is busy (load average {load:.1f}): times will scatter", file=sys.stderr)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()

    def write(self, name: str, **figures: Any) -> dict[str, Any]:
        """Write a line and return what it says."""
        from noctule.measure import result_line  # loads torch, which the list of benchmarks does without

        line = result_line(name, **figures)
        print(line, flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(line + "\n")
        return json.loads(line)


def read(path: Path | None, name: str) -> list[dict[str, Any]]:
    """The lines of that name that a file of results has already."""
    if path is None or not path.exists():
        return []
    return [line for text in path.read_text().splitlines() if (line := json.loads(text))["name"] == name]


def show(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr, the first column to the left and the others to the right; nothing where there are no rows."""
    if not rows:
        return
    widths = [max(len(row[at]) for row in [headers, *rows]) for at in range(len(headers))]
    print(f"\n{title}", file=sys.stderr)
    for row in [headers, ["-" * width for width in widths], *rows]:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip(), file=sys.stderr)


Column = str | Callable[[Mapping[str, Any]], str]
"""One cell of a line of results: a format string over its entries, or a function of it."""

TIMES: Column = "{speedup[ratio]:.2f} [{speedup[low]:.2f}, {speedup[high]:.2f}]"


def milliseconds(digits: int) -> Column:
    """The median of a line's timing."""
    return lambda line: f"{line['timing']['median_seconds'] * 1e3:.{digits}f}"


def speedup(line: Mapping[str, Any]) -> str:
    """How many times as fast as the baseline, where there was one."""
    return f"{line['speedup']['ratio']:.2f}" if line["speedup"] else "-"


def table(written: Sequence[dict[str, Any]], name: str, title: str, columns: Mapping[str, Column]) -> None:
    """The results of that name as a table on stderr, without those that are errors."""
    lines = [line for line in written if line["name"] == name and "error" not in line]
    cells = [[c.format(**line) if isinstance(c, str) else c(line) for c in columns.values()] for line in lines]
    show(title, list(columns), cells)


def targets(written: Sequence[dict[str, Any]], name: str, columns: Mapping[str, Column]) -> None:
    """The targets of a benchmark as a table: the columns, then each target and whether it holds."""
    last: dict[str, Column] = {"target": "{target:g}", "holds": lambda line: "yes" if line["holds"] else "NO"}
    table(written, f"{name}.target", f"{name}: targets", {**columns, **last})


def show_errors(lines: Sequence[dict[str, Any]]) -> None:
    """What could not be measured and why, each reason once."""
    reasons = dict.fromkeys(
        (", ".join([line["row"], *([line["layout"]] if "layout" in line else [])]), line["error"].splitlines()[0])
        for line in lines
        if "error" in line
    )
    show("not measured", ("row", "because"), list(reasons))
