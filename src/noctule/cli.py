"""The command line: ``noctule run``, ``server``, ``recipes``, ``data``, ``compare``, ``bench`` and ``doctor``."""

import importlib
import importlib.util
import inspect
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from noctule.errors import NoctuleError, UsageError
from noctule.signature import Parser, add_options, from_json, nearest, options
from noctule.threads import let_threads_sleep

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
    """Run one command; exit status 0, 2 for a wrong command line, 130 for Ctrl-C, 1 for everything else that fails."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": run,
        "server": server,
        "recipes": recipes,
        "data": data,
        "compare": compare,
        "bench": bench,
        "doctor": doctor,
    }
    hidden = {"supervised": supervised}
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_help(commands))
            return 0 if words else 2
        if words[0] == "--version":
            from noctule import __version__

            print(f"noctule {__version__}")
            return 0
        if words[0] not in commands | hidden:
            raise UsageError(
                f"there is no command {words[0]}{nearest(words[0], list(commands))}. Commands: {', '.join(commands)}"
            )
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return (commands | hidden)[words[0]](words[1:])
    except UsageError as error:
        return _fail(error, 2)
    except (NoctuleError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130


def run(words: list[str]) -> int:
    """Train by a recipe, or go on with a run that was stopped."""
    let_threads_sleep()  # before anything loads torch
    from noctule.launch import Strategy
    from noctule.launch.torchrun import under_torchrun
    from noctule.report import RunFolder
    from noctule.start import Asked, start, start_again, start_at_lighthouse, start_under_torchrun, start_with_ticket

    name = words.pop(0) if words and not words[0].startswith("-") else None
    about: dict[str, Any] = {}
    if "--resume" in words or any(word.startswith("--resume=") for word in words):
        early = Parser(prog="noctule run", add_help=False)
        early.add_argument("--resume", type=Path)
        folder = early.parse_known_args(words)[0].resume
        about = RunFolder(folder).about()
        if name is not None and name != about["recipe"]:
            raise UsageError(
                f"{folder} is a run of {about['recipe']}, not of {name}. Leave the recipe out, or start a new run"
            )
        name = about["recipe"]
    if name is None:
        known = ", ".join(shipped())
        if "-h" in words or "--help" in words:
            print(f"usage: noctule run RECIPE [--option value ...]\n\nrecipes: {known}, or your own FILE.py[:FUNCTION]\n"
                  "options of a recipe: noctule run RECIPE --help")  # fmt: skip
            return 0
        raise UsageError(f"say which recipe to run: {known}, or your own FILE.py[:FUNCTION]")
    recipe = find(name)
    parser = Parser(
        prog=f"noctule run {name}", allow_abbrev=False, description=(inspect.getdoc(recipe) or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the run is written (default: runs/RECIPE-TIME)"
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped")
    parser.add_argument("--threads", type=int, metavar="INT", help="processor threads (default: what torch takes)")
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
    elsewhere.add_argument("--ticket", type=Path, metavar="FILE", help="of this worker, as the server has written it")
    given = vars(parser.parse_args(words))
    out, resume, threads = given.pop("out"), given.pop("resume"), given.pop("threads")
    lighthouse, member, ticket = given.pop("lighthouse"), given.pop("member"), given.pop("ticket")
    together = {k: given.pop(k) for k in ("workers", *options(Strategy)) if k in given}
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    asked = Asked(name, recipe, given, threads=threads, together=together, command=["noctule", "run", name, *words])
    if ticket is not None:
        if resume is not None or lighthouse is not None or under_torchrun():
            raise UsageError(
                "--ticket is for a worker by itself: leave out --resume (a run that is in --out goes on), --lighthouse and torchrun"
            )
        return start_with_ticket(asked, out, ticket=ticket)
    if lighthouse is not None or member is not None:
        if lighthouse is None or member is None or out is None or resume is not None or under_torchrun():
            raise UsageError(
                "say --lighthouse MACHINE:PORT, --member INT and --out FOLDER, each worker with a number and a folder of its own, "
                "and neither --resume nor torchrun: a run that is there goes on"
            )
        return start_at_lighthouse(asked, out, lighthouse=lighthouse, member=member)
    if under_torchrun():
        if resume is not None or out is None:
            raise UsageError("under torchrun say --out FOLDER, the same for all workers: a run that is there goes on")
        return start_under_torchrun(asked, out)
    return start_again(asked, resume, out=out) if resume is not None else start(asked, out)


def server(words: list[str]) -> int:
    """Keep a parameter server for workers on several machines, or go on with one that was stopped."""
    from noctule.launch.serving import Serving, keep

    parser = Parser(prog="noctule server", allow_abbrev=False, description=inspect.getdoc(server))
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of its keys, tickets and snapshots")
    add_options(parser, Serving)
    given = vars(parser.parse_args(words))
    keep(given.pop("folder"), given)
    return 0


def supervised(words: list[str]) -> int:
    """Be a worker or the parameter server of a supervisor, at the other end of a socket."""
    from noctule.launch import team
    from noctule.launch.server import keep_server
    from noctule.launch.worker import work
    from noctule.report import RunFolder

    def train(plan: dict[str, Any]) -> None:
        run = RunFolder(plan["run"])
        about = run.about()
        recipe = find(about["recipe"])
        kept = from_json(recipe, about["options"])
        with RunFolder.of_worker(run, plan["member"]) as folder:
            team().trained = bool(folder.summary())  # what is finished is not trained again
            recipe(folder, **kept)

    role, descriptor = words
    return keep_server(int(descriptor)) if role == "server" else work(int(descriptor), train)


def recipes(words: list[str]) -> int:
    """List the recipes that are shipped."""
    Parser(prog="noctule recipes", description=inspect.getdoc(recipes)).parse_args(words)
    for name, function in shipped().items():
        print(f"{name:<14} {(inspect.getdoc(function) or '').splitlines()[0]}")
    return 0


def data(words: list[str]) -> int:
    """List the built-in data sets, or load one (downloading it if need be) and say what it holds."""
    from noctule.data import load, names

    parser = Parser(prog="noctule data", description=inspect.getdoc(data))
    parser.add_argument("name", nargs="?", help="a data set, or a path to your own")
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help="where to look first")
    given = parser.parse_args(words)
    if given.name is None:
        print("\n".join(names))
        return 0
    splits = load(given.name, data_dir=given.data_dir)
    print(f"{splits.train.name}: {splits.train.features} features, {splits.train.classes} classes, "
          f"{len(splits.train)} training, {len(splits.validation)} validation and {len(splits.test)} test samples")  # fmt: skip
    return 0


def compare(words: list[str]) -> int:
    """Print a table of several runs."""
    from noctule.report import RunFolder, compare_table

    parser = Parser(prog="noctule compare", description=inspect.getdoc(compare))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
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
    return importlib.import_module(f"noctule.bench.{words[0]}").main(words[1:]) or 0


def doctor(words: list[str]) -> int:
    """Say what this machine and this installation can do."""
    from noctule.doctor import findings

    Parser(prog="noctule doctor", description=inspect.getdoc(doctor)).parse_args(words)
    for name, finding in findings().items():
        print(f"{name:<18} {finding}")
    return 0


def shipped() -> dict[str, Callable[..., Any]]:
    """The recipes that come with Noctule, by name."""
    from noctule import recipes as package

    return {name: getattr(package, name) for name in package.__all__}


def find(name: str) -> Callable[..., Any]:
    """A shipped recipe by its name, or the user's own by FILE.py or FILE.py:FUNCTION."""
    file, _, function = name.partition(":")
    if not file.endswith(".py"):
        if name not in shipped():
            raise UsageError(
                f"there is no recipe {name}{nearest(name, list(shipped()))}. Recipes: {', '.join(shipped())}, or FILE.py[:FUNCTION]"
            )
        return shipped()[name]
    path = Path(file)
    function = function or path.stem
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    recipe = getattr(module, function, None)
    if not callable(recipe):
        raise UsageError(f"{path} has no function {function}: name it with {path}:FUNCTION")
    return recipe


def _help(commands: dict[str, Callable[[list[str]], int]]) -> str:
    lines = [f"  {name:<9} {(inspect.getdoc(command) or '').splitlines()[0]}" for name, command in commands.items()]
    return "usage: noctule COMMAND ...\n\n" + "\n".join(lines) + "\n\nnoctule COMMAND --help says more of each."


def _fail(error: Exception, status: int) -> int:
    print(f"noctule: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
