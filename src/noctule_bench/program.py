"""What the benchmark programs share: options from a signature, JSON lines as they come, a table at the end."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from noctule.cli.signature import Parser, add_options
from noctule.core.errors import UsageError
from noctule.core.place import nearest
from noctule.measure import result_line

BENCHMARKS = (
    "layers",
    "convolution",
    "codecs",
    "fashion",
    "memory",
    "accuracy",
    "original",
    "rewiring",
    "shrinking",
    "bat_brain",
    "transformer",
    "together",
    "asynchronous",
    "link",
    "faults",
)


def main(words: list[str]) -> int:
    """Run a benchmark by its name: the function behind ``noctule bench``."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: noctule bench NAME [--option value ...]\n\nbenchmarks: {', '.join(BENCHMARKS)}")
        return 0 if words else 2
    if words[0] not in BENCHMARKS:
        raise UsageError(
            f"there is no benchmark {words[0]}{nearest(words[0], BENCHMARKS)}. Benchmarks: {', '.join(BENCHMARKS)}"
        )
    return importlib.import_module(f"noctule_bench.{words[0]}").main(words[1:]) or 0


def run(name: str, benchmark: Callable[..., None], argv: Sequence[str] | None) -> int:
    """Call a benchmark with the options that the command line gives; raises `UsageError` where it cannot be read."""
    text = (benchmark.__doc__ or "").split("\n\n")[0]
    parser = Parser(prog=f"noctule bench {name}", allow_abbrev=False, description=text)
    add_options(parser, benchmark)
    benchmark(**vars(parser.parse_args(argv)))
    return 0


def as_script(main: Callable[[], int]) -> int:
    """The exit status of a program that was started by itself: 2 for a wrong command line, 130 for Ctrl-C."""
    try:
        return main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def chosen(rows: Sequence[str], known: Sequence[str]) -> list[str]:
    """The rows to measure: those asked for, or all that are known."""
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


def show_errors(lines: Sequence[dict[str, Any]]) -> None:
    """What could not be measured and why, each reason once."""
    reasons = dict.fromkeys(
        (", ".join([line["row"], *([line["layout"]] if "layout" in line else [])]), line["error"].splitlines()[0])
        for line in lines
        if "error" in line
    )
    show("not measured", ("row", "because"), list(reasons))
