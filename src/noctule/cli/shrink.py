"""``noctule shrink``: the smallest model that meets targets."""

import inspect
from argparse import SUPPRESS
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noctule.cli.lookup import canonical, find
from noctule.cli.signature import Parser
from noctule.cli.threads import let_threads_sleep
from noctule.core.errors import UsageError
from noctule.core.place import absolute, nearest

if TYPE_CHECKING:
    from noctule.shrinking import Source


def main(words: list[str]) -> int:
    """Make a model smaller until it meets targets: candidates are trained, written and measured, and one is chosen."""
    let_threads_sleep()  # before torch is loaded
    parser = Parser(prog="noctule shrink", description=inspect.getdoc(main), argument_default=SUPPRESS)
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a finished run, mlp, sparse_mlp, cnn, resnet, or FILE.py:FUNCTION"
    )
    parser.add_argument("--data", required=True, help="as `noctule run --data` takes it, with classes")
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        help="bytes=10x, bytes=40000, latency=3x, latency_ms=0.5 or accuracy=0.9; several are met together",
    )
    parser.add_argument(
        "--within", type=float, help="points of accuracy that the choice may lie below the source (default: 0.5)"
    )
    parser.add_argument("--epochs", type=int, help="of each candidate that is trained (default: 4)")
    parser.add_argument("--teacher-epochs", type=int, help="of a source that is not trained yet (default: 5)")
    parser.add_argument(
        "--out", type=absolute, metavar="FOLDER", help="default: runs/shrink-MODEL-DATA; a search there goes on"
    )
    parser.add_argument("--only", metavar="NAME", help="train and write this one candidate again")
    parser.add_argument("--seed", type=int, help="of weights and the order of the data (default: 0)")
    parser.add_argument("--to", choices=("noctule", "onnxruntime"), help="the runtime (default: noctule)")
    parser.add_argument("--threads", type=int, help="of training and of the runtime (default: 1)")
    parser.add_argument(
        "--data-dir", type=absolute, metavar="FOLDER", help="where built-in data sets are looked for first"
    )
    given = vars(parser.parse_args(words))
    out, only, data_dir = given.pop("out", None), given.pop("only", None), given.pop("data_dir", None)
    from noctule.shrinking import Asked, search

    given["target"] = tuple(given["target"])
    name = given["model"]
    given["model"] = name if _shipped(name) else str(absolute(name)) if ".py" not in name else canonical(name)
    if (path := absolute(given["data"])).exists():
        given["data"] = str(path)
    asked = Asked(**given)
    stem = "-".join(Path(text.partition(":")[0]).stem for text in (asked.model, asked.data))
    folder = out or absolute(f"runs/shrink-{stem}")
    search(asked, lambda: _source(asked.model, asked.data, data_dir, asked.seed), folder, only=only, say=_say)
    return 0


def _shipped(name: str) -> bool:
    from noctule.shrinking import SHIPPED

    return name in SHIPPED


def _say(line: str) -> None:
    print(line, flush=True)


def _source(name: str, data: str, data_dir: Path | None, seed: int) -> "Source":
    """The model of a name, with its data."""
    from noctule.cli.predictions import trained_model
    from noctule.report import RunFolder
    from noctule.shrinking import SHIPPED, of_function, of_name, of_run

    where: dict[str, Any] = {"data_dir": data_dir}
    if name in SHIPPED:
        return of_name(name, data, seed=seed, **where)
    if name.partition(":")[0].endswith(".py"):
        return of_function(find(name), name, data, seed=seed, **where)
    if Path(name).is_dir():
        return of_run(trained_model(RunFolder(name), "sparse"), Path(name), data, **where)
    raise UsageError(
        f"there is no model {Path(name).name}{nearest(Path(name).name, SHIPPED)}. Models: {', '.join(SHIPPED)}, the folder of a "
        "finished run, or FILE.py:FUNCTION"
    )
