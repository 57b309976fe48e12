"""The command ``noctule``: finds the file of a command and turns errors into an exit status.

Slow imports, torch above all, come after the command line was checked.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence

from noctule.cli import bench, card, compare, data, doctor, predict, recipes, run, server, shrink
from noctule.cli.lookup import neighbours
from noctule.cli.output import tolerant
from noctule.core.errors import NoctuleError, UsageError
from noctule.core.place import nearest
from noctule.train.interrupt import Stopped

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run.main,
    "server": server.main,
    "predict": predict.main,
    "shrink": shrink.main,
    "card": card.main,
    "recipes": recipes.main,
    "data": data.main,
    "compare": compare.main,
    "bench": bench.main,
    "doctor": doctor.main,
}
"""Each command with its function, whose docstring is its help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    It is 0, 2 for a wrong command line, 130 for Ctrl-C, 143 for SIGTERM, and 1 for everything else that fails.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(words))


def guarded(work: Callable[[], int]) -> int:
    """Run a function as a command does: with its handling of output and errors; return the exit status."""
    try:
        with tolerant(), neighbours(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            try:
                return work()
            except UsageError as error:
                return _fail(error, 2)
            except (NoctuleError, OSError) as error:
                return _fail(error, 1)
            except KeyboardInterrupt as error:
                return error.status if isinstance(error, Stopped) else 130
    except OSError as error:  # of standard output itself
        return _fail(error, 1)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<9} {(inspect.getdoc(main) or '').splitlines()[0]}" for name, main in COMMANDS.items()]
        print("\n".join(["usage: noctule COMMAND ...", "", *lines, "", "noctule COMMAND --help says more of each."]))
        return 0 if words else 2
    if words[0] == "--version":
        from noctule import __version__

        print(f"noctule {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(
            f"there is no command {words[0]}{nearest(words[0], list(COMMANDS))}. Commands: {', '.join(COMMANDS)}"
        )
    return COMMANDS[words[0]](words[1:])


def _fail(error: Exception, status: int) -> int:
    print(f"noctule: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
