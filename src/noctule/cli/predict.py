"""``noctule predict``: predictions of a finished run, or of a shipped file, as CSV."""

import inspect

from noctule.cli.signature import Parser
from noctule.core.place import absolute


def main(words: list[str]) -> int:
    """Predict with the model of a finished run, or with a shipped file: CSV with a line for each sample."""
    parser = Parser(prog="noctule predict", description=inspect.getdoc(main))
    parser.add_argument(
        "run", type=absolute, metavar="RUN", help="folder of a finished run, or a shipped file beside its data.json"
    )
    parser.add_argument("data", metavar="DATA", help="as `noctule run --data` takes it, with or without the target")
    parser.add_argument("--out", type=absolute, metavar="FILE.csv", help="where to write (default: standard output)")
    parser.add_argument("--series", choices=("sparse", "dense"), default="sparse", help="the model, or its dense twin")
    parser.add_argument(
        "--data-dir", type=absolute, metavar="FOLDER", help="where built-in data sets are looked for first"
    )
    given = vars(parser.parse_args(words))
    from noctule.cli.predictions import print_predictions

    print_predictions(given.pop("run"), given.pop("data"), **given)
    return 0
