"""The training of an estimator's network: one epoch after another, for as long as the caller asks for them."""

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
"""Samples in memory as dense rows at once where nothing is learnt."""

_global_generator = threading.Lock()


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs (n, features) of float32, a NumPy array or a SciPy matrix in CSR form, their n targets, and what each counts."""

    inputs: Any
    targets: Tensor
    weights: Tensor | None = None
    """(n,) of float64, positive; None where all count alike."""

    def __len__(self) -> int:
        """How many there are."""
        return self.inputs.shape[0]

    def take(self, rows: np.ndarray) -> "Samples":
        """Those in these rows, copied."""
        chosen = torch.from_numpy(rows)
        return Samples(self.inputs[rows], self.targets[chosen], None if self.weights is None else self.weights[chosen])

    def weighted(self, weights: np.ndarray | None) -> "Samples":
        """Those that count for something; where all count alike they have no weights, whatever these are."""
        if weights is None:
            return self
        kept = Samples(self.inputs, self.targets, torch.from_numpy(weights))
        if not weights.all():
            kept = kept.take(weights.nonzero()[0])
        assert kept.weights is not None
        return replace(kept, weights=None) if bool((kept.weights == kept.weights[0]).all()) else kept

    def balanced(self) -> "Samples":
        """The same with weights whose mean is 1."""
        return self if self.weights is None else replace(self, weights=self.weights / self.weights.mean())

    def dense(self) -> Tensor:
        """The inputs as a dense tensor."""
        return _dense(self.inputs)


@dataclass
class Progress:
    """How far a training is: all that its next epoch depends on, beside the weights."""

    seed: int
    """What is random in an epoch is a function of this and the epoch's number."""
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
    """Train for an epoch each time the next mean loss is asked for, until the iterator is closed.

    A sample of weight 2 counts as the same sample twice: the loss of a batch is weighted by what its samples count among all.

    Between epochs the model is in evaluation mode and torch's global generator as it was. Ctrl-C raises KeyboardInterrupt between
    two steps, so that the model stays whole.

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
    """What the model makes of inputs (n, features), dense or CSR: (n, outputs), float64 for what is computed of them."""
    rows = [np.arange(n, min(n + ROWS_AT_A_TIME, inputs.shape[0])) for n in range(0, inputs.shape[0], ROWS_AT_A_TIME)]
    return torch.cat([model(_dense(inputs[chosen])) for chosen in rows]).double()


def mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The loss of a batch, of those of its samples (B,)."""
    return losses.mean() if weights is None else (losses * weights.to(losses)).mean()


def _dense(rows: Any) -> Tensor:
    return torch.from_numpy(rows if isinstance(rows, np.ndarray) else rows.toarray())


@contextmanager
def _training(model: nn.Module, *, seed: int) -> Iterator[None]:
    """The model in training mode, its dropout drawing from ``seed``."""
    model.train()
    try:
        with _seeded(seed) if any(map(_drops, model.modules())) else nullcontext():
            yield
    finally:
        model.eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global generator, seeded for a while and put back; threads that want it take turns."""
    with _global_generator, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) or (isinstance(module, SparseLayer) and module.epilogue.dropout > 0.0)
