"""Which precision is the fastest? Each is exported and measured, none is assumed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from noctule.core.errors import ExportError
from noctule.deploy.agreement import plain
from noctule.deploy.card import Card, card_of
from noctule.deploy.exporting import export
from noctule.deploy.target import Ranges
from noctule.deploy.targets import named


@dataclass(frozen=True)
class Precisions:
    """The cards of a model in all precisions that a runtime has."""

    cards: dict[str, Card]
    refused: dict[str, str]
    """Precision -> why it could not be had."""
    fastest: str

    def __str__(self) -> str:
        """All cards, and what was refused."""
        return "\n\n".join([*map(str, self.cards.values()), *(f"{p}: {why}" for p, why in self.refused.items())])


def precisions_of(
    model: nn.Module,
    example: Any,
    folder: str | Path,
    *,
    to: str = "onnxruntime",
    precisions: Sequence[str] = (),
    inputs: Any = None,
    targets: Any = None,
    ranges: Ranges | None = None,
    batches: Iterable[Any] | None = None,
    activation_bits: int = 8,
    **how: Any,
) -> Precisions:
    """Export a model in each precision, measure the files, and note on each card which is the fastest at the smallest batch.

    Args:
        model: as for `export`, with ``example``, ``to``, ``ranges``, ``batches`` and ``activation_bits``.
        example: a batch of its inputs.
        folder: where the files go, each named by its precision.
        to: the target.
        precisions: those to try, all that the target has where none is given.
        inputs: what the files are measured with, the example where there are none.
        targets: the class of each sample.
        ranges: of activations.
        batches: of training data.
        activation_bits: 8 or 7.
        how: what else `card_of` takes.

    Raises:
        ExportError: no precision could be had.
    """
    target, kept = named(to), None if batches is None else [*batches]
    cards: dict[str, Card] = {}
    refused: dict[str, str] = {}
    for precision in precisions or target.precisions:
        file = Path(folder) / f"{precision}{target.suffix}"
        try:
            exported = export(
                model,
                example,
                file,
                to=to,
                precision=precision,
                ranges=ranges,
                batches=kept,
                activation_bits=activation_bits,
            )
            cards[precision] = card_of(
                exported, plain(example) if inputs is None else inputs, targets, source=model, **how
            )
        except ExportError as error:
            refused[precision] = str(error)
    times = {p: entry["p50_ms"] for p, card in cards.items() if "p50_ms" in (entry := card.batches[0])}
    if not times:
        raise ExportError(f"no precision could be had: {'; '.join(f'{p}: {why}' for p, why in refused.items())}")
    fastest = min(times, key=lambda p: times[p])
    for card in cards.values():
        ms = ", ".join(f"{p} {time:.3f} ms" for p, time in times.items())
        card.fastest_precision = f"{fastest} at batch {card.batches[0]['batch']} ({ms})"
    return Precisions(cards, refused, fastest)
