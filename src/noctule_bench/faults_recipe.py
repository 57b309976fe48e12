"""What `noctule bench faults` trains: a small network of which every step leaves a line, so that none is lost unseen.

noctule run .../noctule_bench/faults_recipe.py:training --workers 3 --out runs/traced
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import Method, attach
from noctule.data import Batches, load
from noctule.exchange import AllReduce, EverySync
from noctule.models import mlp
from noctule.report import Journal, RunFolder
from noctule.team import team
from noctule.train.fit import fit

TRACE = "steps.jsonl"
"""Of each worker, in its own folder."""
_ENDLESS = 1_000_000


@dataclass(frozen=True)
class Step:
    """A line: a step that is done."""

    at: float
    """On the clock that all processes of a machine share."""
    process: int
    session: int
    """How many times this process has begun to train: in each group once."""
    world: int
    step: int
    along: float
    """The weights' part in a direction that is always the same: no two weights differ in it by chance."""
    digest: str | None
    """Of the weights' bytes: after some steps, and after the first one of each session."""


class Trace(Method):
    """Adds a line to a file after every step.

    Args:
        path: of the file.
        digest_every: steps from one digest to the next.
    """

    def __init__(self, path: Path, *, digest_every: int) -> None:
        """Nothing is written yet."""
        self.path, self.digest_every = path, digest_every
        self.steps = self.sessions = 0

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """A new session."""
        self.sessions, self._first = self.sessions + 1, True
        self._weights = [p.detach() for p in model.parameters()]
        generator = torch.Generator().manual_seed(0)
        self._directions = [torch.randn(p.numel(), generator=generator, dtype=p.dtype) for p in self._weights]

    def after_step(self) -> None:
        """Write the line in one piece: after a kill it is there whole or not at all."""
        self.steps += 1
        digest = _digest(self._weights) if self._first or self.steps % self.digest_every == 0 else None
        self._first = False
        along = sum(float(p.flatten() @ d) for p, d in zip(self._weights, self._directions, strict=True))
        done = Step(time.monotonic(), os.getpid(), self.sessions, team().world, self.steps, along, digest)
        with self.path.open("a") as file:
            file.write(json.dumps(vars(done)) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """How far it is."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps = int(state["steps"])


class InDouble(nn.Module):
    """Lets a network of float64 take float32: where rounding is that small, a step that is lost cannot hide in it."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers."""
        return x.double()


def training(
    run: RunFolder,
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    hidden: tuple[int, ...] = (300, 100),
    double: bool = True,
    batch: int = 96,
    learning_rate: float = 0.05,
    epochs: int = _ENDLESS,
    digest_every: int = 5,
    checkpoint_seconds: float = 30.0,
    seed: int = 0,
) -> None:
    """Train a perceptron until Ctrl-C, and write a line after every step.

    Args:
        data: a data set.
        data_dir: where data sets are looked for first.
        hidden: widths of the hidden layers.
        double: float64 rather than float32.
        batch: samples of a step, of all workers together.
        learning_rate: of plain gradient descent.
        epochs: of the training.
        digest_every: steps from one digest of the weights to the next.
        checkpoint_seconds: from one checkpoint to the next.
        seed: of the weights and of the batches.
    """
    splits = load(data, data_dir=data_dir, seed=seed)
    torch.manual_seed(seed)
    model: nn.Module = mlp(splits.train.features, *hidden, splits.train.classes)
    if double:
        model = nn.Sequential(InDouble(), model.double())
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    here, journal = team(), Journal(run, "traced")
    batches = Batches(splits.train, batch, seed=seed)
    shared = here.share(batches)
    methods = [Trace(run.path / TRACE, digest_every=digest_every), *here.methods(steps=epochs * len(batches))]
    own = here.journal(journal, steps=epochs * len(batches))
    here.train(
        lambda: fit(
            model,
            optimizer,
            shared,
            validation=splits.validation,
            epochs=epochs,
            methods=methods,
            journal=own,
            checkpoint_seconds=checkpoint_seconds,
        )
    )


def over_link(rank: int, workers: int, folder: str, steps: int, width: int) -> list[Any] | None:
    """Some steps of a small network on random numbers, the same each time; when it was given up and why, or None.

    Args:
        rank: of this worker.
        workers: how many there are.
        folder: where its lines go, in one of its own.
        steps: to make.
        width: of the network's layers.
    """
    torch.manual_seed(0)
    model = mlp(width, width, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, targets = torch.randn(workers, steps, 8, width)[rank], torch.randint(10, (workers, steps, 8))[rank]
    path = Path(folder) / str(rank) / TRACE
    path.parent.mkdir(parents=True)
    try:
        with attach(model, optimizer, Trace(path, digest_every=1), EverySync(Channel(path=AllReduce()))):
            for x, y in zip(inputs, targets, strict=True):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    except LostWorkerError as error:
        return [time.monotonic(), str(error)]
    return None


def _digest(weights: Sequence[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for p in weights:
        found.update(p.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
