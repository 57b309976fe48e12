"""What recipes share: a sparse network and its dense twin, trained alike one after the other, and what each of them took."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from noctule.core.method import Method
from noctule.core.schedule import cosine
from noctule.data import Batches, Splits, Text
from noctule.measure import footprint, measure
from noctule.recipes.difference import difference, keep, right
from noctule.recipes.own_data import errors, loss_for
from noctule.recipes.pace import alone_seconds, compared
from noctule.recipes.twin import strongest_
from noctule.report import Journal, RunFolder, write_report
from noctule.sparse.rewire import Grow, Rewire, anywhere, guided, steepest
from noctule.team import team
from noctule.train.fit import Fitted, evaluate, fit

SMALL_WEIGHTS = 10_000_000
"""A dense twin of at most so many weights is trained too, unless told otherwise."""

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
    """Train the sparse network, then its dense twin where asked for or small; the run's summary and report follow.

    Args:
        run: what was finished in it before it was resumed is not trained again.
        train: trains the series of a journal and returns its outcome.
        about: what the summary says besides the outcomes.
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
        if found := difference(_right(run, "sparse"), _right(run, "dense")):
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
    """Train, read the test set once with the weights that validation chose, and say what it took.

    A dense twin computes in the way that is the fastest here; choosing it is no part of what is measured.
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
    judged = _judged(model, fitted, splits)
    if splits.train.classes:
        keep(_right(journal.run, journal.series), right(model, splits.test))
    if not here.alone and here.one_machine and here.rank == 0:
        alone = alone_seconds(model, optimizer, train, loss_for(splits.train), workers=here.world)
        chosen |= {"alone_seconds_per_epoch": alone, "alone_threads": here.world * torch.get_num_threads()}
        words = compared(here.world, judged["seconds_per_epoch"] or 0.0, alone, threads=chosen["alone_threads"])
        if words:
            print(f"{journal.series}: {words}", flush=True)
    return judged | {
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


def settling(rewire: str, *, fraction: float, every: int, steps: int, seed: int) -> Sequence[Rewire]:
    """Connections that move less and less: the fraction falls along a cosine to zero at three quarters of the training."""
    until = max(1, steps * 3 // 4)
    falling = cosine(fraction, end=0.0, steps=until)
    return team().rewire(grow=GROWERS[rewire], fraction=falling, every=every, until=until, seed=seed)


def falling_rate(optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """A learning rate that falls along a cosine to a hundredth; None where there is no step to take."""
    return CosineAnnealingLR(optimizer, steps, eta_min=optimizer.param_groups[0]["lr"] / 100) if steps else None


def _right(run: RunFolder, series: str) -> Path:
    """Where it is kept which samples of the test set a network got right."""
    return run.path / f"right-{series}.npy"


def _judged(model: nn.Module, fitted: Fitted, splits: Splits | Text) -> dict[str, Any]:
    if fitted.best_state:
        model.load_state_dict(fitted.best_state)
    loss, score = evaluate(model, splits.test, loss_fn=loss_for(splits.train))
    scores: dict[str, Any] = {"test_accuracy": score}
    if isinstance(splits, Splits) and not splits.train.classes:
        scores = {"test_r2": score, **errors(model, splits)}
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
    """Of forward and all gradients, for one sample, counted in one real step that leaves the running averages alone."""
    inputs, targets = next(train.epoch(0))
    model.eval()
    with measure(dense_operations=True) as cost:
        loss_for(train.dataset)(model(inputs), targets).backward()
    model.zero_grad()
    model.train()
    return cost.multiply_adds / len(targets)
