"""``noctule data``: the built-in data sets, and what a data set holds."""

import inspect

from noctule.cli.signature import Parser
from noctule.cli.source import declared
from noctule.core.place import absolute


def main(words: list[str]) -> int:
    """List the built-in data sets, or load one (downloading it if need be) and say what it holds."""
    parser = Parser(prog="noctule data", description=inspect.getdoc(main))
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
