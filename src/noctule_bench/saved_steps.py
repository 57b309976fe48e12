"""Training steps of residual networks whose saved activations are compressed, checkpointed or left alone."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from noctule.core.method import attach
from noctule.data import Batches, Splits, load, standardize
from noctule.memory import AdaptiveBound, Saved, compress_saved
from noctule.models import resnet

ROWS = ("off", "8 bits", "8 bits, all kept", "4 bits", "adaptive", "checkpoint")
LEARNING_RATE = 0.05
Step = Callable[[Tensor, Tensor], Saved | None]


def prepared(
    row: str, data: str, data_dir: Path | None, depth: int, batch: int, warm: int, k: float
) -> Callable[[], Saved | None]:
    """A training step on the next batch; of the adaptive row after some, in which it finds its bounds."""
    splits = standardize(load(data, data_dir=data_dir, seed=0, validation_fraction=0.1))
    step = stepper(row, network(splits, depth, seed=0), k)
    batches = cycle(list(islice(Batches(splits.train, batch, seed=0).epoch(0), 20)))
    for _ in range(warm if row == "adaptive" else 2):
        step(*next(batches))
    return lambda: step(*next(batches))


def network(splits: Splits, depth: int, seed: int) -> nn.Sequential:
    """A residual network for a data set of images."""
    torch.manual_seed(seed)
    return resnet(splits.train.image_shape, splits.train.classes, depth=depth)


def stepper(row: str, model: nn.Sequential, k: float, steps: int | None = None) -> Step:
    """A training step of one row; the rate falls along a cosine where the number of steps is given."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    scheduler = None if steps is None else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bound = AdaptiveBound(k=k)
    if row == "adaptive":
        attach(model, optimizer, bound)

    def step(inputs: Tensor, targets: Tensor) -> Saved | None:
        optimizer.zero_grad()
        with _context(row, bound) as kept:
            loss = nn.functional.cross_entropy(_forward(row, model, inputs), targets)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        return kept

    return step


def _context(row: str, bound: AdaptiveBound) -> Any:
    if row == "adaptive":
        return compress_saved(8, adaptive=bound)
    if "bits" in row:
        return compress_saved(int(row[0]), recompute="all kept" not in row)
    return nullcontext()


def _forward(row: str, model: nn.Sequential, inputs: Tensor) -> Tensor:
    if row != "checkpoint":
        return model(inputs)
    return checkpoint_sequential(model, round(math.sqrt(len(model))), inputs, use_reentrant=False)
