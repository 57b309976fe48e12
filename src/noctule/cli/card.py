"""``noctule card``: what a shipped file costs, measured."""

import inspect

from noctule.cli.signature import Parser
from noctule.core.errors import UsageError
from noctule.core.place import absolute


def main(words: list[str]) -> int:
    """Measure a shipped file: bytes, latency, memory, energy, accuracy; as text, JSON and a page."""
    parser = Parser(prog="noctule card", description=inspect.getdoc(main))
    parser.add_argument(
        "file", type=absolute, metavar="FILE", help="a shipped file beside the data.json of its training"
    )
    parser.add_argument("data", metavar="DATA", help="as `noctule run --data` takes it")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime (default: 1)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 64], metavar="N", help="samples of a call (default: 1 64)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each number of samples (default: 2)")
    parser.add_argument(
        "--data-dir", type=absolute, metavar="FOLDER", help="where built-in data sets are looked for first"
    )
    given = parser.parse_args(words)
    if min(given.batches) < 1 or given.threads < 1 or not 0 < given.seconds < 1e4:
        raise UsageError("--batches and --threads are at least 1, --seconds lies between 0 and 10,000")
    if not given.file.is_file():
        raise UsageError(f"there is no file {given.file}")
    from noctule.cli.predictions import prepared
    from noctule.deploy import card_of
    from noctule.report.card import write_card

    inputs, targets = prepared(given.file, given.data, data_dir=given.data_dir)
    card = card_of(given.file, inputs, targets, batch_sizes=given.batches, threads=given.threads, seconds=given.seconds)
    print(card)
    path = card.save()
    page = write_card(card.as_dict(), path.with_suffix(".html"))
    print(f"{path}\n{page}")
    return 0
