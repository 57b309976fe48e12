"""How large a batch is worth its samples? Measured while training, from gradients that are there anyway.

McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A: the squared
norms of a worker's gradient and of the mean of all say how much of them is noise. Differs from the paper: each worker takes its own
gradient for the small batch, so nothing more is sent; workers' figures scatter a little round one another.

Shapes: W workers, b samples in a worker's batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from noctule.channel import Exchange, Work
from noctule.topology import Remap


class NoiseScale(Exchange):
    """Another exchange, which it leaves as it is, and what can be learnt from it.

    Below `batch` samples in a step (of all workers), more workers or larger batches save almost as many steps; far above it they
    save hardly any.

    Args:
        exchange: of exact or unbiased gradients, whose aggregate is the mean.
        samples: b.
        workers: W; at least two.
        smoothing: of the running means, in (0, 1); each step counts 1 - smoothing.

    Raises:
        ValueError: one of these is out of its range.
    """

    def __init__(self, exchange: Exchange, *, samples: int, workers: int, smoothing: float = 0.99) -> None:
        """Nothing is measured yet."""
        if samples < 1 or workers < 2 or not 0.0 < smoothing < 1.0:
            raise ValueError(
                "the noise scale compares one worker's gradient with that of several: samples must be at least 1, workers at "
                f"least 2 and smoothing in (0, 1), got {samples}, {workers} and {smoothing}"
            )
        self.exchange, self.samples, self.workers, self.smoothing = exchange, samples, workers, smoothing
        self.signal = self.noise = 0.0
        """Running sums of the squared norm of the true gradient, and of the variance of one sample's."""
        self.calls = 0

    @property
    def batch(self) -> float | None:
        """The noise scale, in samples: None before the first exchange, infinite where noise is all there is."""
        if not self.calls:
            return None
        return self.noise / self.signal if self.signal > 0.0 else float("inf")

    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """What the other exchange makes of them."""
        small = _squared_norm(tensors)
        totals = self.exchange(tensors, keys)
        large, b, more = _squared_norm(totals), self.samples, self.samples * self.workers
        if small - small == 0.0 and large - large == 0.0:  # no overflow
            signal, noise = (more * large - b * small) / (more - b), (small - large) / (1.0 / b - 1.0 / more)
            self.signal = self.smoothing * self.signal + (1.0 - self.smoothing) * signal
            self.noise = self.smoothing * self.noise + (1.0 - self.smoothing) * noise
            self.calls += 1
        return totals

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
        return {"signal": self.signal, "noise": self.noise, "calls": self.calls, "exchange": self.exchange.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.signal, self.noise, self.calls = float(state["signal"]), float(state["noise"]), int(state["calls"])
        self.exchange.load_state_dict(state["exchange"])

    def __repr__(self) -> str:
        """What must be alike on all workers."""
        return f"NoiseScale({self.exchange!r})"


def _squared_norm(tensors: Sequence[Tensor]) -> float:
    return float(sum((x.detach().double().square().sum() for x in tensors), torch.zeros((), dtype=torch.float64)))
