"""How large a batch is worth its samples? Measured while training, from gradients that are there anyway.

McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A: the squared
norms of a worker's gradient and of the mean of all say how much of them is noise. Differs from the paper: each worker takes its own
gradient for the small batch, so nothing more is sent; workers' figures scatter a little round one another. Not every step is
measured, where that would take too much of the time.

Shapes: b samples in a worker's batch, B in all of them.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from noctule.core.exchange import Exchange, Work
from noctule.core.remap import Remap


class NoiseScale(Exchange):
    """Another exchange, which it leaves as it is, and what can be learnt from it.

    Below `batch` samples in a step (of all workers), more workers or larger batches save almost as many steps; far above it they
    save hardly any.

    Args:
        exchange: of exact gradients, whose aggregate is the mean over all samples.
        samples: says after an exchange what b and B were in it; where no other worker had any, nothing is measured.
        smoothing: of the running means, in (0, 1); each measurement counts 1 - smoothing.
        most_time: share of the time that measuring may take.

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
        exchange: Exchange,
        *,
        samples: Callable[[], tuple[float, float]],
        smoothing: float = 0.99,
        most_time: float = 0.01,
    ) -> None:
        """Nothing is measured yet."""
        if not 0.0 < smoothing < 1.0 or not 0.0 < most_time <= 1.0:
            raise ValueError(f"smoothing lies in (0, 1) and most_time in (0, 1], got {smoothing} and {most_time}")
        self.at_once = exchange.at_once
        self.exchange, self.samples, self.smoothing, self.most_time = exchange, samples, smoothing, most_time
        self.signal = self.noise = 0.0
        """Running sums of the squared norm of the true gradient, and of the variance of one sample's."""
        self.measured = 0
        """How many exchanges."""
        self._began: float | None = None
        self._spent = 0.0

    @property
    def batch(self) -> float | None:
        """The noise scale, in samples: None before the first measurement, infinite where noise is all there is."""
        if not self.measured:
            return None
        return self.noise / self.signal if self.signal > 0.0 else float("inf")

    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """What the other exchange makes of them."""
        begun = time.perf_counter()
        if self._began is None:
            self._began = begun
        if self._spent > self.most_time * (begun - self._began):
            return self.exchange(tensors, keys)
        small = _squared_norm(tensors)
        sent = time.perf_counter()
        totals = self.exchange(tensors, keys)
        back = time.perf_counter()
        self._measure(small, _squared_norm(totals))
        self._spent += sent - begun + time.perf_counter() - back
        return totals

    def _measure(self, small: float, large: float) -> None:
        """From the squared norms of this worker's gradient and of all workers'."""
        b, everyone = self.samples()
        if 0.0 < b < everyone and math.isfinite(small) and math.isfinite(large):
            signal = (everyone * large - b * small) / (everyone - b)
            noise = (small - large) / (1.0 / b - 1.0 / everyone)
            self.signal = self.smoothing * self.signal + (1.0 - self.smoothing) * signal
            self.noise = self.smoothing * self.noise + (1.0 - self.smoothing) * noise
            self.measured += 1

    @property
    def counts(self) -> bool:
        """Whether the other exchange counts this worker."""
        return self.exchange.counts

    def share(self, message: bytes) -> list[bytes]:
        """What every worker has to say, in their order."""
        return self.exchange.share(message)

    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Work:
        """What an exchange of such tensors would take."""
        return self.exchange.rehearse(tensors, keys)

    def release(self) -> dict[str, Tensor]:
        """What is owed."""
        return self.exchange.release()

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """The numbers of this key changed their places."""
        self.exchange.remapped(key, remap, shape)

    def state_dict(self) -> dict[str, Any]:
        """The running sums, and the other exchange's state."""
        measured = {"signal": self.signal, "noise": self.noise, "measured": self.measured}
        return {**measured, "exchange": self.exchange.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.signal, self.noise, self.measured = float(state["signal"]), float(state["noise"]), int(state["measured"])
        self.exchange.load_state_dict(state["exchange"])

    def __repr__(self) -> str:
        """What must be alike on all workers."""
        return f"NoiseScale({self.exchange!r})"


def _squared_norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([x.detach() for x in tensors])) ** 2
