"""The command line: ``noctule run``, ``server``, ``recipes``, ``data``, ``compare``, ``bench`` and ``doctor``.

What takes long to import, torch above all, is imported once the words are known to be right.
"""

import importlib
import inspect
import os
import signal
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from typing import Any

from noctule.cli.lookup import canonical, find, neighbours, shipped
from noctule.cli.output import tolerant
from noctule.cli.signature import Parser, add_options, from_json, options
from noctule.cli.source import declared
from noctule.cli.threads import let_threads_sleep
from noctule.core.errors import NoctuleError, UsageError
from noctule.core.place import absolute, nearest
from noctule.team.strategy import Serving, Strategy, several
from noctule.train.interrupt import Stopped, ended_by_signals, handling, stopped_by_signals

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    It is 0, 2 for a wrong command line, 130 for Ctrl-C, 143 for SIGTERM, and 1 for everything else that fails.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": run,
        "server": server,
        "predict": predict,
        "recipes": recipes,
        "data": data,
        "compare": compare,
        "bench": bench,
        "doctor": doctor,
    }
    try:
        with tolerant(), neighbours(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            try:
                return _chosen(words, commands)
            except UsageError as error:
                return _fail(error, 2)
            except (NoctuleError, OSError) as error:
                return _fail(error, 1)
            except KeyboardInterrupt as error:
                return error.status if isinstance(error, Stopped) else 130
    except OSError as error:  # of standard output itself
        return _fail(error, 1)


def _chosen(words: list[str], commands: dict[str, Callable[[list[str]], int]]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help(commands))
        return 0 if words else 2
    if words[0] == "--version":
        from noctule import __version__

        print(f"noctule {__version__}")
        return 0
    if words[0] == "supervised":  # started by a supervisor, and no command of the user's
        return supervised(words[1:])
    if words[0] not in commands:
        raise UsageError(
            f"there is no command {words[0]}{nearest(words[0], list(commands))}. Commands: {', '.join(commands)}"
        )
    return commands[words[0]](words[1:])


def run(words: list[str]) -> int:
    """Train by a recipe, or go on with a run that was stopped."""
    let_threads_sleep()  # before anything loads torch
    from noctule.report.folder import RunFolder, refuse_occupied

    name = words.pop(0) if words and not words[0].startswith("-") else None
    if "--resume" in words or any(word.startswith("--resume=") for word in words):
        early = Parser(prog="noctule run", add_help=False)
        early.add_argument("--resume", type=absolute)
        folder = RunFolder(early.parse_known_args(words)[0].resume)
        recorded = folder.settle()["recipe"]
        if name is not None and canonical(name) != canonical(recorded):
            raise UsageError(
                f"{folder.path} is a run of {recorded}, not of {name}. Leave the recipe out, or start a new run"
            )
        name = recorded
    if name is None:
        known = ", ".join(shipped())
        if "-h" in words or "--help" in words:
            print(f"usage: noctule run RECIPE [--option value ...]\n\nrecipes: {known}, or your own FILE.py[:FUNCTION]\n"
                  "options of a recipe: noctule run RECIPE --help")  # fmt: skip
            return 0
        raise UsageError(f"say which recipe to run: {known}, or your own FILE.py[:FUNCTION]")
    with ended_by_signals():
        recipe = find(name)
    given = vars(_run_parser(name, recipe).parse_args(words))
    out, resume, threads = given.pop("out"), given.pop("resume"), given.pop("threads")
    lighthouse, member, ticket = given.pop("lighthouse"), given.pop("member"), given.pop("ticket")
    together = {k: given.pop(k) for k in ("workers", *options(Strategy)) if k in given}
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
            several(together)
            if resume is None and out is not None:
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


def _run_parser(name: str, recipe: Callable[..., Any]) -> Parser:
    parser = Parser(
        prog=f"noctule run {name}", allow_abbrev=False, description=(inspect.getdoc(recipe) or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--out", type=absolute, metavar="FOLDER", help="where the run is written (default: runs/RECIPE-TIME)"
    )
    parser.add_argument("--resume", type=absolute, metavar="RUN", help="go on with a run that was stopped")
    parser.add_argument(
        "--threads", type=int, metavar="INT", help="processor threads (default: as many as this process may use)"
    )
    add_options(parser, recipe)
    several = parser.add_argument_group("several workers on this machine")
    several.add_argument("--workers", type=int, metavar="INT", default=SUPPRESS, help="processes that train together")
    add_options(several, Strategy)
    elsewhere = parser.add_argument_group(
        "one of several workers, on any machines, that meet at a lighthouse of torchft"
    )
    elsewhere.add_argument("--lighthouse", metavar="MACHINE:PORT", help="where it is")
    elsewhere.add_argument("--member", type=int, metavar="INT", help="which of the workers this is, from 0 on")
    elsewhere = parser.add_argument_group("one worker of a parameter server on any machine (see noctule server --help)")
    elsewhere.add_argument(
        "--ticket", type=absolute, metavar="FILE", help="of this worker, as the server has written it"
    )
    return parser


def server(words: list[str]) -> int:
    """Keep a parameter server for workers on several machines, or go on with one that was stopped."""
    parser = Parser(prog="noctule server", allow_abbrev=False, description=inspect.getdoc(server))
    parser.add_argument("folder", type=absolute, metavar="FOLDER", help="of its keys, tickets and snapshots")
    add_options(parser, Serving)
    given = vars(parser.parse_args(words))
    folder = given.pop("folder")
    if not (folder / "server.json").exists():
        try:
            Serving(**given)
        except ValueError as error:
            raise UsageError(str(error)) from error
    with ended_by_signals():
        from noctule.cli.serving import keep
    with stopped_by_signals():
        keep(folder, given)
    return 0


def supervised(words: list[str]) -> int:
    """Be a worker or the parameter server of a supervisor, at the other end of a socket."""
    role, descriptor = words

    def obey(signum: int) -> None:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt

    with handling(obey):  # SIGTERM, for all processes of a job, comes here too: the supervisor says what to do
        from noctule.cli.start import announce
        from noctule.launch.server import keep_server
        from noctule.launch.worker import work
        from noctule.report import RunFolder
        from noctule.team import team

        def train(plan: dict[str, Any]) -> None:
            run = RunFolder(plan["run"])
            about = run.about()
            recipe = find(about["recipe"])
            kept = from_json(recipe, about["options"])
            with RunFolder.of_worker(run, plan["member"]) as folder:
                if plan["member"] == 0:
                    announce(folder)
                team().trained = bool(folder.summary())  # what is finished is not trained again
                recipe(folder, **kept)

        return keep_server(int(descriptor)) if role == "server" else work(int(descriptor), train)


def predict(words: list[str]) -> int:
    """Predict with the model of a finished run: CSV with a line for each sample."""
    parser = Parser(prog="noctule predict", description=inspect.getdoc(predict))
    parser.add_argument("run", type=absolute, metavar="RUN", help="folder of a finished run")
    parser.add_argument("data", metavar="DATA", help="as `noctule run --data` takes it, with or without the target")
    parser.add_argument("--out", type=absolute, metavar="FILE.csv", help="where to write (default: standard output)")
    parser.add_argument("--series", choices=("sparse", "dense"), default="sparse", help="the model, or its dense twin")
    parser.add_argument(
        "--data-dir", type=absolute, metavar="FOLDER", help="where built-in data sets are looked for first"
    )
    given = vars(parser.parse_args(words))
    from noctule.cli.predict import print_predictions

    print_predictions(given.pop("run"), given.pop("data"), **given)
    return 0


def recipes(words: list[str]) -> int:
    """List the recipes that are shipped."""
    Parser(prog="noctule recipes", description=inspect.getdoc(recipes)).parse_args(words)
    for name, function in shipped().items():
        print(f"{name:<14} {(inspect.getdoc(function) or '').splitlines()[0]}")
    return 0


def data(words: list[str]) -> int:
    """List the built-in data sets, or load one (downloading it if need be) and say what it holds."""
    parser = Parser(prog="noctule data", description=inspect.getdoc(data))
    source = declared("noctule.data.names", "DataSource").__metadata__[0]
    parser.add_argument("name", nargs="?", type=source, help="a data set, or a path to your own")
    parser.add_argument("--data-dir", type=absolute, metavar="FOLDER", help="where to look first")
    parser.add_argument("--target", metavar="COLUMN", help="of a table, the one to predict")
    given = parser.parse_args(words)
    if given.name is None:
        print("\n".join(source.names))
        return 0
    from noctule.data import load

    print(load(given.name, data_dir=given.data_dir, target=given.target).describe())
    return 0


def compare(words: list[str]) -> int:
    """Print a table of several runs."""
    from noctule.report import RunFolder, compare_table

    parser = Parser(prog="noctule compare", description=inspect.getdoc(compare))
    parser.add_argument("runs", nargs="+", type=absolute, metavar="RUN")
    print(compare_table([RunFolder(path) for path in parser.parse_args(words).runs]))
    return 0


def bench(words: list[str]) -> int:
    """Measure Noctule beside its strongest alternatives."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: noctule bench NAME [--option value ...]\n\nbenchmarks: {', '.join(BENCHMARKS)}")
        return 0 if words else 2
    if words[0] not in BENCHMARKS:
        raise UsageError(
            f"there is no benchmark {words[0]}{nearest(words[0], BENCHMARKS)}. Benchmarks: {', '.join(BENCHMARKS)}"
        )
    return importlib.import_module(f"noctule_bench.{words[0]}").main(words[1:]) or 0


def doctor(words: list[str]) -> int:
    """Say what this machine and this installation can do."""
    from noctule.cli.doctor import findings

    Parser(prog="noctule doctor", description=inspect.getdoc(doctor)).parse_args(words)
    for name, finding in findings().items():
        print(f"{name:<18} {finding}")
    return 0


def _help(commands: dict[str, Callable[[list[str]], int]]) -> str:
    lines = [f"  {name:<9} {(inspect.getdoc(command) or '').splitlines()[0]}" for name, command in commands.items()]
    return "usage: noctule COMMAND ...\n\n" + "\n".join(lines) + "\n\nnoctule COMMAND --help says more of each."


def _fail(error: Exception, status: int) -> int:
    print(f"noctule: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
