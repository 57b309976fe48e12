"""The options of a strategy on a command line: ``--strategy NAME`` chooses it, and only its own options are accepted."""

import inspect
from argparse import SUPPRESS
from collections.abc import Sequence

from noctule.cli.signature import Parser, add_options
from noctule.core.errors import UsageError
from noctule.team import strategies
from noctule.team.strategy import Strategy


def named(words: Sequence[str]) -> str | None:
    """The strategy that the words name, if they name one."""
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--strategy")
    return early.parse_known_args(list(words))[0].strategy


def add_strategy_options(parser: Parser, kind: type[Strategy], known: Sequence[str]) -> None:
    """Add ``--strategy`` and the options of one strategy.

    Args:
        parser: of the command.
        kind: the chosen strategy.
        known: the names to choose from.
    """
    lines = {name: (inspect.getdoc(strategies.chosen(name)) or "").splitlines()[0] for name in known}
    about = "; ".join(f"{name}: {line.rstrip('.')}" for name, line in lines.items())
    group = parser.add_argument_group(
        "how several workers train together",
        f"{about}. The options below are those of {kind.name}; for those of another one say --strategy NAME --help",
    )
    text = f"one of {', '.join(known)} (default: {kind.name})"
    group.add_argument("--strategy", metavar="NAME", default=SUPPRESS, help=text)
    add_options(group, kind)


def refuse_options_of_others(parser: Parser, kind: type[Strategy], words: Sequence[str]) -> None:
    """Raise `UsageError` for an option that the command does not have with this strategy, but with another one."""
    own = {flag for action in parser._actions for flag in action.option_strings}
    for word in words:
        flag = word.partition("=")[0]
        option = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and flag not in own and strategies.owners_of(option):
            raise UsageError(f"{strategies.no_option(kind, option)}. See {parser.prog} --strategy {kind.name} --help")
