"""The training loop of `bat_brain`: a plain one over the public pieces, for weights of which there is no room for a second copy.

`fit` keeps the best weights beside the living ones. Here a checkpoint is written straight from the living tensors, and read back
piece by piece; an epoch is so many steps, after which connections move.
"""

import math
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from noctule.core.errors import CheckpointError
from noctule.core.finite import check_parameters, explain
from noctule.core.method import Session, attach
from noctule.data.prototypes import Prototypes
from noctule.measure import Progress
from noctule.measure.activations import kept_for_backward
from noctule.measure.operations import listening
from noctule.recipes.brain import sparse_linears
from noctule.report import Journal
from noctule.sparse.rewire import Rewire
from noctule.train.interrupt import deferred_interrupt

LINE = 16
"""Samples in a forward pass alone, at least: those of a neuron then fill a line of the cache."""


@dataclass
class Done:
    """What the checkpoints hold beside the weights: for every step its seconds and its loss."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Training:
    """A model, its optimizer, its data and what moves its connections (or None)."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        data: Prototypes,
        mover: Rewire | None,
        *,
        batch: int,
        every: int,
        samples: int,
    ) -> None:
        """Nothing is trained yet; an epoch has ``every`` steps, a look at a part of the data takes ``samples``."""
        self.model, self.optimizer, self.data, self.mover = model, optimizer, data, mover
        self.batch, self.every, self.samples = batch, every, samples
        self.layers = sparse_linears(model)
        self.done = Done()
        self._seen: dict[str, Any] = {}

    @property
    def steps(self) -> int:
        """Done so far, before a resumption too."""
        return len(self.done.losses)

    def run(self, steps: int, journal: Journal, checkpoint_seconds: float) -> None:
        """From the last checkpoint, if there is one, to the last step."""
        with (
            attach(self.model, self.optimizer, *([self.mover] if self.mover else [])) as session,
            deferred_interrupt() as interrupted,
        ):
            self._resume(session, journal)
            saved, moved = time.perf_counter(), self._moved()
            with Progress(steps, label=f"training {journal.series}", unit="steps", start=self.steps) as bar:
                while self.steps < steps:
                    self._step()
                    bar.advance(note=f"loss {self.done.losses[-1]:.4f}")
                    last, stop = self.steps == steps, interrupted()
                    if last or self.steps % self.every == 0:
                        before, moved = moved, self._moved()
                        journal.log(self._record({name: moved[name] - before[name] for name in moved}))
                    if last or stop or time.perf_counter() - saved >= checkpoint_seconds:
                        self._save(session, journal)
                        saved = time.perf_counter()
                    if stop:
                        raise KeyboardInterrupt

    def evaluate(self, part: str) -> tuple[float, float]:
        """Mean loss and accuracy on the first samples of a part of the data."""
        size = max(self.batch, LINE)
        loss, right = 0.0, 0
        with torch.no_grad():
            for number, start in enumerate(range(0, self.samples, size)):
                inputs, targets = self.data.batch(part, number, min(size, self.samples - start))
                outputs = self.model(inputs)
                loss += float(cross_entropy(outputs, targets, reduction="sum"))
                right += int((outputs.argmax(1) == targets).sum())
        return loss / self.samples, right / self.samples

    def facts(self) -> dict[str, Any]:
        """What a step takes; one after which connections move is another kind of step."""
        seconds, every = self.done.seconds, self.every
        plain = [s for at, s in enumerate(seconds, start=1) if at % every] or seconds
        moving = [s for at, s in enumerate(seconds, start=1) if at % every == 0 and at < len(seconds)]
        epochs = [sum(seconds[at : at + every]) for at in range(0, len(seconds), every)]
        return {
            "seconds": sum(seconds),
            "seconds_per_epoch": median(epochs) if epochs else None,
            "seconds_per_step": median(plain) if plain else None,
            "seconds_per_moving_step": median(moving) if moving and self.mover else None,
            **self._seen,
        }

    def _step(self) -> None:
        started = time.perf_counter()
        inputs, targets = self.data.batch("train", self.steps, self.batch)
        with listening() as counter:
            with kept_for_backward(self.model) as kept:
                loss = cross_entropy(self.model(inputs), targets)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise explain(self.model, inputs, step=self.steps + 1)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # now, so that what comes between two steps has their memory
        for layer in self.layers.values():
            _ = layer.topology.transposed  # of places that have moved, so that this step bears all of its cost
        self.done.seconds.append(time.perf_counter() - started)
        self.done.losses.append(value)
        self._seen |= {
            "activation_bytes": kept.nbytes,
            "multiply_adds_per_sample": counter.multiply_adds / self.batch,
        }

    def _moved(self) -> dict[str, int]:
        return dict(self.mover.moved) if self.mover else dict.fromkeys(self.layers, 0)

    def _record(self, moved: dict[str, int]) -> dict[str, Any]:
        epoch = -(-self.steps // self.every)
        losses, seconds = (each[(epoch - 1) * self.every :] for each in (self.done.losses, self.done.seconds))
        loss, accuracy = self.evaluate("validation")
        return {
            "epoch": epoch,
            "step": self.steps,
            "seconds": sum(self.done.seconds),
            "train_loss": sum(losses) / len(losses),
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "samples_per_second": len(losses) * self.batch / sum(seconds),
            "layers": {
                name: {"weights": m.weights, "places": m.topology.places, "moved": moved[name]}
                for name, m in self.layers.items()
            },
        }

    def _pieces(self, session: Session) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "session": session}

    def _save(self, session: Session, journal: Journal) -> None:
        check_parameters(self.model)
        started = time.perf_counter()
        states = {name: piece.state_dict() for name, piece in self._pieces(session).items()}
        path = journal.checkpoints.save(self.steps, {**states, "done": dict(vars(self.done))})
        self._seen |= {
            "checkpoint_seconds": time.perf_counter() - started,
            "checkpoint_bytes": path.stat().st_size,
        }

    def _resume(self, session: Session, journal: Journal) -> None:
        if (latest := journal.checkpoints.latest()) is not None:
            state = latest[1]
            try:
                self.done = Done(**state.pop("done"))
                for name, piece in self._pieces(session).items():
                    piece.load_state_dict(state.pop(name))  # popped, so that its memory is free for the next
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"the checkpoint is of another training: {error}. Resume with the same recipe and options"
                ) from error
        journal.run.truncate_metrics(lambda record: record["step"] <= self.steps)
