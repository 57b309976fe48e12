"""``noctule run``: train by a recipe, alone or with other workers."""

import inspect
import os
from argparse import SUPPRESS
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noctule.cli.lookup import canonical, find, shipped
from noctule.cli.signature import Parser, add_options
from noctule.cli.strategy_options import add_strategy_options, named, refuse_options_of_others
from noctule.cli.threads import let_threads_sleep
from noctule.core.errors import UsageError
from noctule.core.place import absolute
from noctule.team import strategies
from noctule.team.strategy import Strategy
from noctule.train.interrupt import ended_by_signals, stopped_by_signals


def main(words: list[str]) -> int:
    """Train by a recipe, or resume a run that was stopped."""
    let_threads_sleep()  # before torch is loaded
    name = words.pop(0) if words and not words[0].startswith("-") else None
    name = _recipe_to_resume(words, name) or name
    if name is None:
        known = ", ".join(shipped())
        if "-h" in words or "--help" in words:
            print(f"usage: noctule run RECIPE [--option value ...]\n\nrecipes: {known}, or your own FILE.py[:FUNCTION]\n"
                  "options of a recipe: noctule run RECIPE --help")  # fmt: skip
            return 0
        raise UsageError(f"say which recipe to run: {known}, or your own FILE.py[:FUNCTION]")
    with ended_by_signals():
        recipe = find(name)
    kind = strategies.chosen(named(words) or strategies.DEFAULT)
    parser = _parser(name, recipe, kind)
    refuse_options_of_others(parser, kind, words)
    given = vars(parser.parse_args(words))
    out, resume, threads = given.pop("out"), given.pop("resume"), given.pop("threads")
    lighthouse, member, ticket = given.pop("lighthouse"), given.pop("member"), given.pop("ticket")
    together = {k: given.pop(k) for k in ("workers", "strategy", *strategies.options_of(kind)) if k in given}
    torchrun = all(variable in os.environ for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    if ticket is not None and (resume is not None or lighthouse is not None or torchrun):
        raise UsageError(
            "--ticket is for a worker by itself: leave out --resume (a run that is in --out goes on), --lighthouse and torchrun"
        )
    if (lighthouse is not None or member is not None) and (
        lighthouse is None or member is None or out is None or resume is not None or torchrun
    ):
        raise UsageError(
            "say --lighthouse MACHINE:PORT, --member INT and --out FOLDER, each worker with a number and a folder of its own, "
            "and neither --resume nor torchrun: a run that is there goes on"
        )
    if ticket is None and lighthouse is None:
        if torchrun and (resume is not None or out is None):
            raise UsageError("under torchrun say --out FOLDER, the same for all workers: a run that is there goes on")
        if not torchrun:
            strategies.workers_and_strategy(together)
            if resume is None and out is not None:
                from noctule.report.folder import refuse_occupied

                refuse_occupied(out)
    with ended_by_signals():
        from noctule.cli import start

    command = ["noctule", "run", name, *words]
    asked = start.Asked(canonical(name), recipe, given, threads=threads, together=together, command=command)
    with stopped_by_signals():
        if ticket is not None:
            return start.start_with_ticket(asked, out, ticket=ticket)
        if lighthouse is not None:
            assert out is not None
            assert member is not None
            return start.start_at_lighthouse(asked, out, lighthouse=lighthouse, member=member)
        if torchrun:
            assert out is not None
            return start.start_under_torchrun(asked, out)
        return start.start_again(asked, resume, out=out) if resume is not None else start.start(asked, out)


def _recipe_to_resume(words: list[str], name: str | None) -> str | None:
    """The recipe of the run that ``--resume`` names, if it is there; UsageError if another one was given."""
    if "--resume" not in words and not any(word.startswith("--resume=") for word in words):
        return None
    from noctule.report.folder import RunFolder

    early = Parser(prog="noctule run", add_help=False)
    early.add_argument("--resume", type=absolute)
    path: Path = early.parse_known_args(words)[0].resume
    folder = RunFolder(path)
    recorded = folder.settle()["recipe"]
    if name is not None and canonical(name) != canonical(recorded):
        raise UsageError(
            f"{folder.path} is a run of {recorded}, not of {name}. Leave the recipe out, or start a new run"
        )
    return recorded


def _parser(name: str, recipe: Callable[..., Any], kind: type[Strategy]) -> Parser:
    parser = Parser(
        prog=f"noctule run {name}", allow_abbrev=False, description=(inspect.getdoc(recipe) or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--out", type=absolute, metavar="FOLDER", help="where the run is written (default: runs/RECIPE-TIME)"
    )
    parser.add_argument("--resume", type=absolute, metavar="RUN", help="resume a run that was stopped")
    parser.add_argument(
        "--threads", type=int, metavar="INT", help="processor threads (default: as many as this process may use)"
    )
    add_options(parser, recipe)
    several = parser.add_argument_group("several workers on this machine")
    several.add_argument("--workers", type=int, metavar="INT", default=SUPPRESS, help="processes that train together")
    add_strategy_options(parser, kind, strategies.names())
    elsewhere = parser.add_argument_group("a worker of several, on any machines, that meet at a lighthouse of torchft")
    elsewhere.add_argument("--lighthouse", metavar="MACHINE:PORT", help="where it is")
    elsewhere.add_argument("--member", type=int, metavar="INT", help="the number of this worker, from 0 on")
    elsewhere = parser.add_argument_group("a worker of a parameter server on any machine (see noctule server --help)")
    elsewhere.add_argument(
        "--ticket", type=absolute, metavar="FILE", help="of this worker, as the server has written it"
    )
    return parser
