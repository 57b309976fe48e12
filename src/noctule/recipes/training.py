"""The common part of recipes: train a sparse network, then its dense twin alike, and record the figures of both."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from noctule.core.method import Method
from noctule.core.schedule import cosine
from noctule.data import Batches, Splits, Text
from noctule.measure import footprint, measure
from noctule.recipes.difference import accuracies, difference
from noctule.recipes.own_data import loss_for, regression_errors
from noctule.recipes.single_process import single_process_seconds, slowdown
from noctule.recipes.twin import strongest_
from noctule.report import Journal, RunFolder, write_report
from noctule.sparse.layers import SparseLinear
from noctule.sparse.rewire import Grow, Rewire, anywhere, guided, steepest
from noctule.team import team
from noctule.train.fit import Fitted, evaluate, fit

SMALL_WEIGHTS = 10_000_000
"""Most weights of a dense twin that is trained too by default."""

Compare = Literal["auto", "dense", "none"]
Moving = Literal["gse", "rigl", "set", "none"]

GROWERS: dict[str, Grow] = {"gse": guided, "rigl": steepest, "set": anywhere}


def train_series(
    run: RunFolder,
    train: Callable[[Journal], dict[str, Any]],
    *,
    about: dict[str, Any],
    compare: Compare,
    dense_weights: int,
) -> dict[str, Any]:
    """Train the sparse network, then its dense twin if requested or small, and write the run's summary and report.

    Args:
        run: series that are finished in a resumed run are not trained again.
        train: trains the series of a journal and returns its outcome.
        about: entries of the summary beside the outcomes.
        compare: whether the dense twin is trained too: yes, no, or where it is small (auto).
        dense_weights: of the dense twin.
    """
    series, many = ["sparse"], team().many_models
    if compare == "dense" and not many:
        raise ValueError("a parameter server holds one network, and the dense twin is another: use --compare none")
    if compare == "dense" or (compare == "auto" and many and dense_weights <= SMALL_WEIGHTS):
        series.append("dense")
    summary = run.summary() or {**about, "series": {}}
    for name in series:
        if name in summary["series"]:
            continue
        summary["series"][name] = train(Journal(run, name))
        if found := difference(_accuracies_file(run, "sparse"), _accuracies_file(run, "dense")):
            summary["difference"] = found
        run.write_summary(summary)
        write_report(run)
    return summary


def train_classifier(
    model: nn.Module,
    optimizer: Optimizer,
    train: Batches,
    splits: Splits | Text,
    *,
    epochs: int,
    methods: Sequence[Method],
    scheduler: LRScheduler | None,
    journal: Journal,
    checkpoint_seconds: float,
) -> dict[str, Any]:
    """Train, test once with the weights that validation selected, and return scores, times, bytes and energy.

    A dense twin computes in the fastest way of this machine; the choice of the way is not part of the measurement.
    """
    here = team()
    multiply_adds = _multiply_adds(model, train)
    chosen: dict[str, Any] = {"way": "fp32"}
    if journal.series == "dense" and here.one_machine:
        inputs, targets = next(train.epoch(0))
        loss_fn = loss_for(splits.train)
        chosen = strongest_(model, lambda twin: loss_fn(twin(inputs), targets), journal.run.whole / "twin.json")
    with measure() as cost:
        steps = epochs * len(train)
        shared, methods = here.share(train, loss_fn=loss_for(splits.train)), [*methods, *here.methods(steps=steps)]
        own = here.journal(journal, steps=steps)
        fitted = here.train(
            lambda: fit(
                model,
                optimizer,
                shared,
                validation=splits.validation,
                epochs=epochs,
                loss_fn=loss_for(splits.train),
                methods=methods,
                scheduler=scheduler,
                journal=own,
                checkpoint_seconds=checkpoint_seconds,
            )
        )
    held = footprint(model, optimizer, all_gradients=True)
    scores = _scores(model, fitted, splits)
    if splits.train.classes:
        np.save(_accuracies_file(journal.run, journal.series), accuracies(model, splits.test).numpy())
    if not here.alone and here.one_machine and here.rank == 0:
        alone = single_process_seconds(model, optimizer, train, loss_for(splits.train), workers=here.world)
        chosen |= {"alone_seconds_per_epoch": alone, "alone_threads": here.world * torch.get_num_threads()}
        message = slowdown(here.world, scores["seconds_per_epoch"] or 0.0, alone, threads=chosen["alone_threads"])
        if message:
            print(f"{journal.series}: {message}", flush=True)
    return scores | {
        **chosen,
        "parameters": held.parameters,
        "weights_bytes": held.weights_bytes,
        "index_bytes": held.index_bytes,
        "gradient_bytes": held.gradient_bytes,
        "optimizer_bytes": held.optimizer_bytes,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "memory_before_bytes": cost.memory_before_bytes,
        "multiply_adds_per_sample": multiply_adds,
        "joules": cost.joules,
    }


def falling_rewire(rewire: str, *, fraction: float, every: int, steps: int, seed: int) -> Sequence[Rewire]:
    """Methods that rewire a fraction of the connections, which falls along a cosine to zero at three quarters of the training."""
    until = max(1, steps * 3 // 4)
    falling = cosine(fraction, end=0.0, steps=until)
    return team().rewire(grow=GROWERS[rewire], fraction=falling, every=every, until=until, seed=seed)


def falling_rate(optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """A schedule of the learning rate: along a cosine to a hundredth; None for a training without steps."""
    return CosineAnnealingLR(optimizer, steps, eta_min=optimizer.param_groups[0]["lr"] / 100) if steps else None


def _accuracies_file(run: RunFolder, series: str) -> Path:
    """The file of a network's `accuracies` on the test set."""
    return run.path / f"right-{series}.npy"


def _scores(model: nn.Module, fitted: Fitted, splits: Splits | Text) -> dict[str, Any]:
    if fitted.best_state:
        model.load_state_dict(fitted.best_state)
    loss, score = evaluate(model, splits.test, loss_fn=loss_for(splits.train))
    scores: dict[str, Any] = {"test_accuracy": score}
    if isinstance(splits, Splits) and not splits.train.classes:
        scores = {"test_r2": score, **regression_errors(model, splits)}
    seconds = sorted(fitted.epoch_seconds)
    return {
        **scores,
        "test_loss": loss,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.epoch,
        "seconds": fitted.seconds,
        "seconds_per_epoch": seconds[len(seconds) // 2] if seconds else None,
    }


def _multiply_adds(model: nn.Module, train: Batches) -> float:
    """Multiply-adds of forward and backward for one sample, counted in one step that leaves running averages unchanged."""
    inputs, targets = next(train.epoch(0))
    model.eval()
    with measure(dense_operations=True) as cost:
        loss_for(train.dataset)(model(inputs), targets).backward()
    model.zero_grad()
    model.train()
    return cost.multiply_adds / len(targets)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Sizes of the sparse linear layers by name, for `model.json`."""
    return {
        name: {
            "in_features": m.in_features,
            "out_features": m.out_features,
            "weights": m.weights,
            "slope": m.epilogue.slope,
        }
        for name, m in model.named_modules()
        if isinstance(m, SparseLinear)
    }
