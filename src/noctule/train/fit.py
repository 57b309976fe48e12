"""The training loop, made of the public pieces alone."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from noctule.compress.shrink import resize_to
from noctule.core.errors import CheckpointError, ExchangeError
from noctule.core.finite import check_parameters, explain
from noctule.core.method import Method, attach
from noctule.core.optim import sparse_layers
from noctule.core.remap import Remap
from noctule.data import Batches, Dataset, Windows
from noctule.measure import Progress
from noctule.train.interrupt import deferred_interrupt

Loss = Callable[[Tensor, Tensor], Tensor]


class Source(Protocol):
    """Batches by epoch, from any batch on, such as `Batches`."""

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, batch by batch."""
        ...


class SavedStates(Protocol):
    """States of a training by step, such as `Checkpoints`."""

    folder: Path
    """Where the files are."""

    def save(self, step: int, state: Any) -> object:
        """Keep the state of a step."""
        ...

    def latest(self) -> tuple[int, Any] | None:
        """The newest step and its state, if there is one."""
        ...


class Journal(Protocol):
    """The records and checkpoints of a training."""

    @property
    def checkpoints(self) -> SavedStates:
        """The checkpoints of this training."""
        ...

    def log(self, record: dict[str, Any]) -> None:
        """Store the record of an epoch."""
        ...

    def rewind(self, epoch: int) -> None:
        """Remove the records after an epoch, from which training resumes."""
        ...


@dataclass
class Fitted:
    """The progress and the best state of a training; checkpoints hold all of it."""

    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Batches done in the current epoch."""
    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Seconds of training, without validation and checkpoints."""
    epoch_seconds: list[float] = field(default_factory=list)
    """Seconds of training of each finished epoch."""
    best_epoch: int = 0
    """The epoch, from 1, with the best validation accuracy since the widths last changed, the first of equals; without validation
    the last epoch."""
    best_accuracy: float = -1.0
    """Validation accuracy of the best epoch; R2 in a regression."""
    samples: int = 0
    """Samples done in the current epoch."""
    loss_sum: float = 0.0
    """Sum of the losses of these samples."""
    moved: dict[str, int] = field(default_factory=dict)
    """Connections grown in the current epoch, by layer."""
    best_state: dict[str, Any] = field(default_factory=dict, repr=False)
    """The model's state dict at `best_epoch`."""
    built: dict[str, list[int]] = field(default_factory=dict, repr=False)
    """Shapes in the model's state dict at the start of the training, before methods removed neurons."""


def evaluate(
    model: nn.Module, dataset: Dataset | Windows, *, loss_fn: Loss = nn.functional.cross_entropy, batch_size: int = 1000
) -> tuple[float, float]:
    """Mean loss and accuracy on a data set, in evaluation mode; the model's mode is restored.

    In a regression R2 replaces the accuracy: 1 at best, 0 for the mean of the targets.

    Args:
        batch_size: targets at a time, at least those of one sample.
    """
    was_training = model.training
    model.eval()
    loss = right = squares = 0.0
    targets_each = dataset.targets.numel() // len(dataset)
    try:
        with torch.no_grad():
            batches = Batches(dataset, max(1, batch_size // targets_each), seed=0, shuffle=False)
            for inputs, targets in batches.epoch(0):
                outputs = model(inputs)
                loss += float(loss_fn(outputs, targets)) * len(targets)
                if dataset.classes:
                    right += int((outputs.argmax(1) == targets).sum())
                else:
                    squares += float((outputs.flatten() - targets).double().square().sum())
    finally:
        model.train(was_training)
    if not dataset.classes:
        spread = float((dataset.targets.double() - dataset.targets.double().mean()).square().sum())
        return loss / len(dataset), 1.0 - squares / spread if spread else 0.0
    return loss / len(dataset), right / dataset.targets.numel()


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    train: Source,
    *,
    validation: Dataset | Windows | None,
    epochs: int,
    loss_fn: Loss = nn.functional.cross_entropy,
    methods: Sequence[Method] = (),
    scheduler: LRScheduler | None = None,
    journal: Journal | None = None,
    checkpoint_seconds: float = 30.0,
) -> Fitted:
    """Train for ``epochs`` and validate after each; with a journal, resume from its last checkpoint.

    A checkpoint is written after every epoch and, in long ones, every ``checkpoint_seconds``. Ctrl-C writes another and
    raises KeyboardInterrupt; an `ExchangeError`, which comes between two steps, is raised after another checkpoint too. A loss
    that is not finite raises `NonFiniteError` before it reaches the weights, and the last checkpoint stays. With the same seed,
    threads and instruction set a resumed training ends in the same bits as one that was never stopped.

    Args:
        validation: what selects the epoch; with None the last one is taken.
        scheduler: of the learning rate, stepped once after every optimizer step.
        methods: attached round the optimizer's steps, in this order.
    """
    if epochs < 0:
        raise ValueError(f"epochs must be at least 0, got {epochs}")
    progress = Fitted(built=_shapes(model.state_dict()))
    with ExitStack() as stack:
        session = stack.enter_context(attach(model, optimizer, *methods))
        interrupted = stack.enter_context(deferred_interrupt())
        layers = sparse_layers(model)

        def pieces() -> dict[str, Any]:
            stateful = {"model": model, "optimizer": optimizer, "session": session}
            return stateful if scheduler is None else {**stateful, "scheduler": scheduler}

        def save() -> None:
            if journal is not None:
                check_parameters(model)
                states = {name: piece.state_dict() for name, piece in pieces().items()}
                journal.checkpoints.save(
                    progress.step, {**states, "progress": dict(vars(progress)), "random": torch.get_rng_state()}
                )

        if journal is not None:
            if (found := journal.checkpoints.latest()) is not None:
                progress = _resume(found[1], pieces(), built=progress.built)
            journal.rewind(progress.epoch)

        def count(name: str) -> Callable[..., None]:
            def grown(layer: nn.Module, old: Any, remap: Remap) -> None:
                progress.moved[name] = progress.moved.get(name, 0) + remap.grown

            return grown

        def count_step(size: int, value: float) -> None:
            if scheduler is not None:
                scheduler.step()
            progress.samples += size
            progress.loss_sum += value * size
            progress.batch += 1
            progress.step += 1

        label = f"training {getattr(journal, 'series', '')}".strip()
        for name, layer in layers.items():
            stack.callback(layer.register_remap_hook(count(name)).remove)
        bar = stack.enter_context(Progress(epochs * len(train), label=label, unit="steps", start=progress.step))
        model.train()
        while progress.epoch < epochs:
            started = saved = time.perf_counter()
            done, size, value = session.steps, 0, 0.0
            try:
                for inputs, targets in train.epoch(progress.epoch, start=progress.batch):
                    optimizer.zero_grad(set_to_none=True)
                    loss = loss_fn(model(inputs), targets)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise explain(model, inputs, step=progress.step + 1)
                    done, size = session.steps, len(targets)
                    loss.backward()
                    optimizer.step()
                    count_step(size, value)
                    done = session.steps
                    bar.advance(note=f"epoch {progress.epoch + 1}, loss {value:.4f}")
                    now = time.perf_counter()
                    if interrupted() or now - saved >= checkpoint_seconds:
                        progress.seconds += now - started
                        save()
                        if interrupted():
                            raise KeyboardInterrupt
                        started = saved = time.perf_counter()
                session.settle()
            except ExchangeError:
                if session.steps > done:  # the exchange failed after the step
                    count_step(size, value)
                progress.seconds += time.perf_counter() - started
                save()
                raise
            progress.seconds += time.perf_counter() - started
            scores: dict[str, float] = {}
            accuracy = 0.0
            if validation is not None:
                loss, accuracy = evaluate(model, validation, loss_fn=loss_fn)
                scores = {"validation_loss": loss, f"validation_{'accuracy' if validation.classes else 'r2'}": accuracy}
                session.observe(**scores)
            _finish_epoch(progress, model, accuracy, last=validation is None)
            if journal is not None:
                journal.log(
                    {
                        "epoch": progress.epoch,
                        "step": progress.step,
                        "seconds": progress.seconds,
                        "train_loss": progress.loss_sum / progress.samples,
                        **scores,
                        "samples_per_second": progress.samples / progress.epoch_seconds[-1],
                        "layers": {
                            name: {
                                "weights": m.weights,
                                "places": m.topology.places,
                                "moved": progress.moved.get(name, 0),
                            }
                            for name, m in layers.items()
                        },
                    }
                )
            progress.samples, progress.loss_sum, progress.moved = 0, 0.0, {}
            save()
    return progress


def _finish_epoch(progress: Fitted, model: nn.Module, accuracy: float, *, last: bool) -> None:
    progress.epoch += 1
    progress.batch = 0
    progress.epoch_seconds.append(progress.seconds - sum(progress.epoch_seconds))
    state = model.state_dict()
    if last or accuracy > progress.best_accuracy or _shapes(state) != _shapes(progress.best_state):
        progress.best_accuracy, progress.best_epoch = accuracy, progress.epoch
        progress.best_state = copy.deepcopy(state)


def _resume(state: dict[str, Any], pieces: dict[str, Any], *, built: dict[str, list[int]]) -> Fitted:
    missing = {"progress", "random", *pieces}.symmetric_difference(state)
    if missing:
        raise CheckpointError(
            f"the checkpoint is of another training: {sorted(missing)} differ. Resume with the same recipe and options"
        )
    try:
        progress = Fitted(**state["progress"])
        if progress.built not in ({}, built):
            raise ValueError("its model had other layers, or layers of other widths, when it began")
        resize_to(pieces["model"], state["model"])
        for name, piece in pieces.items():
            piece.load_state_dict(state[name])
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint is of another training: {error}. Resume with the same recipe and options"
        ) from error
    torch.set_rng_state(state["random"])
    return progress


def _shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    """The shapes in a model's state dict that do not depend on how many weights sparse layers store."""
    shapes = {}
    for key, value in state.items():
        shape = value.get("shape") if isinstance(value, dict) else getattr(value, "shape", None)
        if shape is not None and key.rpartition(".")[2] != "values":
            shapes[key] = list(shape)
    return shapes
