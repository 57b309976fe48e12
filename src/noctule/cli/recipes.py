"""``noctule recipes``: the shipped recipes."""

import inspect

from noctule.cli.lookup import shipped
from noctule.cli.signature import Parser


def main(words: list[str]) -> int:
    """List the recipes that are shipped."""
    Parser(prog="noctule recipes", description=inspect.getdoc(main)).parse_args(words)
    for name, function in shipped().items():
        print(f"{name:<14} {(inspect.getdoc(function) or '').splitlines()[0]}")
    return 0
