"""The fixed set of what is tried: width, connections and low rank, each change trained on and written in two precisions."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noctule.compress.factor import Factor
from noctule.compress.prune import Blocks, Prune, sparsify_
from noctule.compress.prune.pattern import Pattern, PerLayer
from noctule.compress.shrink import shrink
from noctule.core.convert import convert_
from noctule.core.method import attach
from noctule.core.schedule import cubic

PRECISIONS = ("float32", "int8")


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to the weights of the source, before and while it is trained on."""

    name: str
    width: float = 1.0
    """Share of the neurons and channels that stay."""
    left: float = 1.0
    """Share of the connections that stay at the end."""
    blocks: bool = False
    """Whether connections go in blocks of four neighbouring columns."""
    energy: float = 1.0
    """Share of the squared singular values that layers of low rank keep."""

    @property
    def trains(self) -> bool:
        """Whether the weights change."""
        return self != Change(name=self.name)

    @property
    def names(self) -> list[str]:
        """Of its candidates."""
        return [f"{self.name}-{precision}" for precision in PRECISIONS]

    def cut(self, model: nn.Module, example: Tensor) -> nn.Module:
        """A copy of a model with fewer neurons or of lower rank.

        Raises:
            ValueError: neurons cannot be removed from this model.
        """
        model = copy.deepcopy(model).eval()
        if self.width < 1.0:
            shrink(model, self.width, example=example)
        return convert_(model, Factor(energy=self.energy)).model if self.energy < 1.0 else model

    def pruning(self, model: nn.Module, *, steps: int) -> list[Prune]:
        """The method that removes connections while the model is trained for so many steps; it is done after three quarters."""
        if self.left >= 1.0:
            return []
        weights, places = _sizes(model)
        begin, until, every = sum(weights) / sum(places), max(1, steps * 3 // 4), max(1, steps // 20)
        ramp = cubic(begin, end=begin * self.left, steps=until)
        pattern: Pattern = Blocks(1, 4) if self.blocks else PerLayer(budget=_alike(weights))
        return [Prune(schedule=ramp, every=min(every, until), pattern=pattern)]

    def sketch(self, model: nn.Module) -> nn.Module:
        """A copy of a model from `cut` with connections removed at once: of the size and speed that training ends with."""
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for method in self.pruning(model, steps=1):
            with attach(model, optimizer, method):
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
        return self.finished(model)

    def finished(self, model: nn.Module) -> nn.Module:
        """The model in evaluation mode, with layers of many zeros made sparse where connections were removed."""
        if self.left < 1.0 and any(type(module) in (nn.Linear, nn.Conv2d) for module in model.modules()):
            sparsify_(model)
        return model.eval()


def changes_for(*, sparse: bool, to: str) -> list[Change]:
    """What is tried, the cheapest first; zeros only where the runtime gains from them, blocks only of dense layers."""
    whole, half = Change(name="source"), Change(name="half", width=0.5)
    quarter, three = Change(name="quarter", width=0.25), Change(name="three-quarters", width=0.75)
    if to != "noctule":
        low = Change(name="low-rank", energy=0.8), Change(name="half-low-rank", width=0.5, energy=0.8)
        return [whole, quarter, half, three, *low]
    if sparse:
        gone = [Change(name=f"gone{share}", left=1 - share / 100) for share in (50, 75, 90)]
        both = [Change(name=f"half-gone{share}", width=0.5, left=1 - share / 100) for share in (60, 75)]
        return [whole, half, *both, *gone, three]
    anywhere = [Change(name=n, width=w, left=0.1) for n, w in (("gone90", 1.0), ("half-gone90", 0.5))]
    blocks = Change(name="blocks75", left=0.25, blocks=True)
    return [whole, quarter, half, *anywhere, blocks, three, Change(name="low-rank", energy=0.8)]


@dataclass(kw_only=True)
class Candidate:
    """A line of the record: a file with what was measured of it, or why there is none."""

    name: str
    precision: str
    file: str | None = None
    bytes: int = 0
    deflated_bytes: int = 0
    latency_ms: float = math.inf
    """Median of a call with one sample."""
    latency_64_ms: float | None = None
    memory_bytes: int | None = None
    """Peak over a process with numpy, with one sample."""
    joules: float | None = None
    """Of one sample."""
    accuracy: float = 0.0
    """On the validation part, of the file; of the model after an epoch where it was stopped then."""
    epochs: int = 0
    seconds: float = 0.0
    """Of training, for both precisions together."""
    stopped: str | None = None
    """Why it was not finished."""


Reasons = Callable[[float], list[str]]
"""Validation accuracy after an epoch -> why each precision of a change cannot reach the front, or nothing."""


def hopeless(sketches: Sequence[Candidate], finished: Sequence[Candidate], *, margin: float) -> Reasons:
    """What says whether a training is worth going on with.

    Args:
        sketches: a candidate of each precision, with bytes and milliseconds.
        finished: what was measured before.
        margin: points of accuracy that training may still bring.
    """

    def reasons(accuracy: float) -> list[str]:
        found = []
        for own in sketches:
            cheaper = [o for o in finished if o.bytes <= own.bytes and o.latency_ms <= own.latency_ms]
            best = max(cheaper, key=lambda other: other.accuracy, default=own)
            if best is own or best.accuracy <= accuracy + margin / 100:
                return []
            found.append(
                f"after an epoch {accuracy:.4f} of the validation part was right; {best.name}, which is no larger and no slower "
                f"({best.bytes:,} bytes, {best.latency_ms:.3f} ms), reached {best.accuracy:.4f}"
            )
        return found

    return reasons


def _sizes(model: nn.Module) -> tuple[list[int], list[int]]:
    """Weights and places of each layer that `Prune` takes."""
    layers = Prune(schedule=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, optimizer, layers):
        kept = layers.report().values()
        return [each.weights for each in kept], [each.places for each in kept]


def _alike(weights: list[int]) -> Callable[[Sequence[tuple[int, ...]], int], list[int]]:
    """A budget that takes the same share of the connections that each layer has."""
    return lambda shapes, total: [max(1, round(total * own / sum(weights))) for own in weights]
