"""The training of an estimator's network, as an iterator over epochs."""

import math
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.core.finite import check_parameters, explain
from noctule.core.method import attach
from noctule.sparse.layers import SparseLayer
from noctule.sparse.rewire import Rewire
from noctule.train.interrupt import deferred_interrupt

ROWS_AT_A_TIME = 512
"""Samples of a batch in prediction, which sparse inputs enter as dense rows."""

_global_generator = threading.Lock()


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs (n, features) of float32, a NumPy array or a SciPy matrix in CSR form, their n targets and their weights."""

    inputs: Any
    targets: Tensor
    weights: Tensor | None = None
    """Positive weights, (n,) of float64; None if all are equal."""

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def take(self, rows: np.ndarray) -> "Samples":
        """The samples in these rows, copied."""
        chosen = torch.from_numpy(rows)
        return Samples(self.inputs[rows], self.targets[chosen], None if self.weights is None else self.weights[chosen])

    def weighted(self, weights: np.ndarray | None) -> "Samples":
        """The samples of positive weight, with these weights; with None if they are all equal."""
        if weights is None:
            return self
        kept = Samples(self.inputs, self.targets, torch.from_numpy(weights))
        if not weights.all():
            kept = kept.take(weights.nonzero()[0])
        assert kept.weights is not None
        return replace(kept, weights=None) if bool((kept.weights == kept.weights[0]).all()) else kept

    def balanced(self) -> "Samples":
        """The samples with weights scaled to a mean of 1."""
        return self if self.weights is None else replace(self, weights=self.weights / self.weights.mean())

    def dense(self) -> Tensor:
        """The inputs as a dense tensor."""
        return _dense(self.inputs)


@dataclass
class Progress:
    """The state of a training beside the weights, on which its next epoch depends."""

    seed: int
    """Seed of all randomness, together with the number of the epoch."""
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Optimizer steps done."""
    moments: dict[Tensor, Any] = field(default_factory=dict, repr=False)
    """The optimizer's state, by parameter."""


def epochs(
    model: nn.Module,
    optimizer: Optimizer,
    samples: Samples,
    progress: Progress,
    *,
    loss_fn: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    batch_size: int,
    rewire: Rewire | None = None,
) -> Generator[float]:
    """Train an epoch for each mean loss that the iterator yields, until it is closed.

    A sample of weight 2 has the effect of two samples: the loss of a batch is weighted relative to the mean weight of all samples.

    Between epochs the model is in evaluation mode and torch's global generator is restored. Ctrl-C raises KeyboardInterrupt between
    two steps, so that the model stays consistent.

    Raises:
        NonFiniteError: a loss or a weight became NaN or infinite.
    """
    samples = samples.balanced()
    optimizer.state.update(progress.moments)
    with attach(model, optimizer, *([rewire] if rewire else [])), deferred_interrupt() as interrupted:
        if rewire:
            rewire.load_state_dict({"steps": progress.step, "moved": {}})
        while True:
            random = np.random.default_rng([progress.seed, progress.epoch])
            order, loss_sum = random.permutation(len(samples)), 0.0
            with _training(model, seed=int(random.integers(2**63))):
                for start in range(0, len(samples), batch_size):
                    batch = samples.take(order[start : start + batch_size])
                    inputs = batch.dense()
                    optimizer.zero_grad(set_to_none=True)
                    loss = loss_fn(model(inputs), batch.targets, batch.weights)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise explain(model, inputs, step=progress.step + 1)
                    loss.backward()
                    optimizer.step()
                    progress.step += 1
                    loss_sum += value * len(batch)
                    if interrupted():
                        raise KeyboardInterrupt
            check_parameters(model)
            optimizer.zero_grad(set_to_none=True)
            progress.epoch += 1
            progress.moments = dict(optimizer.state)
            yield loss_sum / len(samples)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> Tensor:
    """Outputs of the model for inputs (n, features), dense or CSR: (n, outputs), as float64 for further computation."""
    rows = [np.arange(n, min(n + ROWS_AT_A_TIME, inputs.shape[0])) for n in range(0, inputs.shape[0], ROWS_AT_A_TIME)]
    return torch.cat([model(_dense(inputs[chosen])) for chosen in rows]).double()


def mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The loss of a batch: the weighted mean of its samples' losses (B,)."""
    return losses.mean() if weights is None else (losses * weights.to(losses)).mean()


def _dense(rows: Any) -> Tensor:
    return torch.from_numpy(rows if isinstance(rows, np.ndarray) else rows.toarray())


@contextmanager
def _training(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Within the block, the model is in training mode and its dropout draws from ``seed``."""
    model.train()
    try:
        with _seeded(seed) if any(map(_drops, model.modules())) else nullcontext():
            yield
    finally:
        model.eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within the block, torch's global generator is seeded; a lock keeps other threads out, and its state is restored."""
    with _global_generator, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) or (isinstance(module, SparseLayer) and module.epilogue.dropout > 0.0)
