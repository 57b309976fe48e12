"""The ranges of activations, observed on a few batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from noctule.compress.quantize.layers import KINDS, check_evaluation
from noctule.compress.quantize.numbers import dequantize, grid, quantize

BINS = 8192
"""Of a histogram: an eighth of a step of 8 bits at most, as the largest number lies in its outer half."""

Ranges = Mapping[str, Sequence[float]]
"""Name of a layer -> smallest and largest number of its inputs: lists, as JSON has them."""


@dataclass
class Histogram:
    """Counts of activations in equal bins from ``-bound`` to ``bound``, which doubles as needed."""

    low: float = 0.0
    high: float = 0.0
    bound: float = 2.0**-20
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64, device="cpu"))

    def add(self, x: Tensor) -> None:
        """Count the numbers of a tensor; raises ValueError where one is not finite."""
        x = x.detach().float()
        low, high = (end.item() for end in x.aminmax())
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            raise ValueError("an activation is NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        while self.bound < max(-low, high):
            self.bound *= 2.0
            middle = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS - BINS // 4] = middle
        self.counts += torch.histc(x, BINS, -self.bound, self.bound).cpu()

    @property
    def centers(self) -> Tensor:
        """The value (BINS,) in the middle of each bin, float64."""
        steps = torch.arange(BINS, dtype=torch.float64, device="cpu")
        return (steps + 0.5) * (2.0 * self.bound / BINS) - self.bound


Observer = Callable[[Histogram], tuple[float, float]]
"""Histogram of activations -> the range that they are clipped to."""


def min_max(observed: Histogram) -> tuple[float, float]:
    """The whole range."""
    return observed.low, observed.high


def percentile(observed: Histogram, share: float = 0.9999) -> tuple[float, float]:
    """The range that holds this share of the numbers, equally many left out on either side."""
    if not 0.5 < share <= 1.0:
        raise ValueError(f"share must lie in (0.5, 1], got {share}")
    below = observed.counts.cumsum(0) / observed.counts.sum()
    out = (1.0 - share) / 2.0
    ends = torch.tensor([out, 1.0 - out], dtype=torch.float64, device="cpu")
    low, high = observed.centers[torch.searchsorted(below, ends).clamp_(max=BINS - 1)].tolist()
    return max(observed.low, min(low, 0.0)), min(observed.high, max(high, 0.0))


def least_error(observed: Histogram, *, bits: int = 8, tries: int = 100) -> tuple[float, float]:
    """Of ranges shrunk towards zero in even steps, the one with the least mean squared rounding error ("MSE")."""
    held = observed.counts > 0.0
    values, counts = observed.centers[held].float(), observed.counts[held]

    def error(share: float) -> float:
        to = grid(share * observed.low, share * observed.high, bits=bits)
        return float((dequantize(quantize(values, to), to) - values).double().square() @ counts)

    best = min((k / tries for k in range(tries, 0, -1)), key=error)
    return best * observed.low, best * observed.high


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], *, observer: Observer = min_max) -> Ranges:
    """Run batches through a model and return the range of each linear layer's and convolution's inputs.

    The ranges are plain numbers: with a model they can be kept as JSON. Use some hundred samples of the training data.

    Args:
        model: in evaluation mode.
        batches: inputs, or (inputs, targets), of which the targets are not used.
        observer: `min_max`, `percentile`, `least_error`, or a function like these.

    Raises:
        ValueError: the model is in training mode; there is no batch; one does not go through the model, has another shape
            than the first, or makes an activation that is not finite.

    >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
    >>> calibrate(model, [torch.tensor([[-1.0, 0.5]])])
    {'0': [-1.0, 0.5]}
    """
    check_evaluation(model.modules())
    seen: dict[str, Histogram] = {}

    def watch(name: str) -> Any:
        return lambda layer, args, named: seen.setdefault(name, Histogram()).add([*args, *named.values()][0])

    layers = ((name, module) for name, module in model.named_modules() if type(module) in KINDS)
    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers]
    first: torch.Size | None = None
    try:
        for number, batch in enumerate(batches):
            x = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(x, Tensor):
                raise ValueError(f"a batch is a tensor or (inputs, targets), got {type(batch).__name__}")
            first = first or x.shape[1:]
            if x.shape[1:] != first or not len(x):
                raise ValueError(
                    f"batch {number} has samples of shape {tuple(x.shape[1:])} ({len(x)} of them), the first had {tuple(first)}"
                )
            try:
                model(x)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise ValueError(
                    f"batch {number} of shape {tuple(x.shape)} does not go through the model: {error}"
                ) from error
    finally:
        for handle in handles:
            handle.remove()
    if first is None:
        raise ValueError("there is no batch to calibrate with: give some hundred samples of the training data")
    return {name: [*observer(histogram)] for name, histogram in seen.items()}
