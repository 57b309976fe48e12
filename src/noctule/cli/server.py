"""``noctule server``: keep a parameter server for workers on several machines."""

import inspect

from noctule.cli.signature import Parser, add_options
from noctule.cli.strategy_options import add_strategy_options, named, refuse_options_of_others
from noctule.core.errors import UsageError
from noctule.core.place import absolute
from noctule.report import files
from noctule.team import strategies
from noctule.team.serving import DEFAULT, Serving, servable
from noctule.train.interrupt import ended_by_signals, stopped_by_signals


def main(words: list[str]) -> int:
    """Keep a parameter server for workers on several machines, or resume one that was stopped."""
    early = Parser(prog="noctule server", add_help=False, allow_abbrev=False)
    early.add_argument("folder", nargs="?", type=absolute)
    path = early.parse_known_args(words)[0].folder
    kept = None if path is None or not (path / "server.json").exists() else files.read_object(path / "server.json")
    kind = strategies.chosen(named(words) or (kept or {}).get("strategy", DEFAULT))
    if kind.name not in servable():
        raise UsageError(f"noctule server does not serve {kind.name}: {', '.join(servable())}")
    parser = Parser(prog="noctule server", allow_abbrev=False, description=inspect.getdoc(main))
    parser.add_argument("folder", type=absolute, metavar="FOLDER", help="of its keys, tickets and snapshots")
    add_options(parser, Serving)
    add_strategy_options(parser, kind, servable())
    refuse_options_of_others(parser, kind, words)
    given = vars(parser.parse_args(words))
    folder = given.pop("folder")
    if kept is None:
        Serving.made(given)
    with ended_by_signals():
        from noctule.cli.serving import keep
    with stopped_by_signals():
        keep(folder, given)
    return 0
