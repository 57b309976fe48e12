"""The gradient noise scale, measured while training: the batch size up to which more samples save steps.

McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A: the squared
norms of a worker's gradient and of the mean of all say how much of them is noise. Differs from the paper: each worker takes its own
gradient for the small batch, so nothing more is sent, and the workers' estimates differ a little. Not every step is measured, where
that would take too much of the time.

Shapes: b samples in a worker's batch, B in all of them.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from noctule.core.exchange import Exchange, Wrapped


class NoiseScale(Wrapped):
    """An exchange that measures the noise scale of the gradients in another, and changes nothing of it.

    Below `batch` samples in a step (of all workers), more workers or larger batches save almost as many steps; far above it they
    save hardly any.

    Args:
        inner: for exact gradients, with the mean over all samples as the aggregate.
        samples: returns b and B of the exchange just done; where no other worker had any samples, nothing is measured.
        smoothing: the weight of the past in the running means, in (0, 1).
        most_time: the share of the time that measuring may take.
        clock: returns seconds.

    Raises:
        ValueError: smoothing or most_time is out of its range.

    >>> from noctule.core.exchange import Channel
    >>> from noctule.exchange import Local
    >>> scale = NoiseScale(Channel(path=Local.together(1)[0]), samples=lambda: (32, 32))  # alone: there is nothing to compare
    >>> scale([torch.ones(2)], ["weight"]), scale.batch
    ([tensor([1., 1.])], None)
    """

    def __init__(
        self,
        inner: Exchange,
        *,
        samples: Callable[[], tuple[float, float]],
        smoothing: float = 0.99,
        most_time: float = 0.01,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0.0 < smoothing < 1.0 or not 0.0 < most_time <= 1.0:
            raise ValueError(f"smoothing lies in (0, 1) and most_time in (0, 1], got {smoothing} and {most_time}")
        self._inner, self._clock = inner, clock
        self.samples, self.smoothing, self.most_time = samples, smoothing, most_time
        self.signal = self.noise = 0.0
        """Running sums of the squared norm of the true gradient, and of the variance of one sample's."""
        self.measured = 0
        """The number of exchanges measured."""
        self._began: float | None = None
        self._spent = 0.0

    @property
    def batch(self) -> float | None:
        """The noise scale, in samples: None before the first measurement, infinite where noise is all there is."""
        if not self.measured:
            return None
        return self.noise / self.signal if self.signal > 0.0 else float("inf")

    @property
    @override
    def inner(self) -> Exchange:
        return self._inner

    @override
    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        begun = self._clock()
        if self._began is None:
            self._began = begun
        if self._spent > self.most_time * (begun - self._began):
            return self.inner(tensors, keys)
        small = _squared_norm(tensors)
        sent = self._clock()
        totals = self.inner(tensors, keys)
        back = self._clock()
        self._measure(small, _squared_norm(totals))
        self._spent += sent - begun + self._clock() - back
        return totals

    def _measure(self, small: float, large: float) -> None:
        """Add a measurement, from the squared norms of this worker's gradient and of all workers'."""
        b, everyone = self.samples()
        if 0.0 < b < everyone and math.isfinite(small) and math.isfinite(large):
            signal = (everyone * large - b * small) / (everyone - b)
            noise = (small - large) / (1.0 / b - 1.0 / everyone)
            self.signal = self.smoothing * self.signal + (1.0 - self.smoothing) * signal
            self.noise = self.smoothing * self.noise + (1.0 - self.smoothing) * noise
            self.measured += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        measured = {"signal": self.signal, "noise": self.noise, "measured": self.measured}
        return {**measured, "exchange": self.inner.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.signal, self.noise, self.measured = float(state["signal"]), float(state["noise"]), int(state["measured"])
        self.inner.load_state_dict(state["exchange"])


def _squared_norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([x.detach() for x in tensors])) ** 2
