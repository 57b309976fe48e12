"""``noctule compare``: a table of several runs."""

import inspect

from noctule.cli.signature import Parser
from noctule.core.place import absolute


def main(words: list[str]) -> int:
    """Print a table of several runs."""
    parser = Parser(prog="noctule compare", description=inspect.getdoc(main))
    parser.add_argument("runs", nargs="+", type=absolute, metavar="RUN")
    runs = parser.parse_args(words).runs
    from noctule.report import RunFolder, compare_table

    print(compare_table([RunFolder(path) for path in runs]))
    return 0
