"""Train a truly sparse multilayer perceptron, beside its dense twin."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from noctule.checkpoint import save_model
from noctule.convert import convert_
from noctule.data import Batches, Splits, load, standardize
from noctule.decay import Decay
from noctule.layers import AllReLU, FuseEpilogue, SparseLinear, ToSparse
from noctule.loop import Fitted, evaluate, fit
from noctule.measure import footprint, measure
from noctule.method import Method
from noctule.models import mlp
from noctule.models.mlp import Activation, relu
from noctule.optim import param_groups
from noctule.report import Journal, RunFolder, write_report
from noctule.rewire import Rewire, anywhere, guided, sign_split, smallest, steepest
from noctule.schedule import cosine

SMALL_WEIGHTS = 10_000_000
"""A dense twin of at most so many weights is trained too, unless told otherwise."""


def sparse_mlp(
    run: RunFolder,
    *,
    data: str = "digits",
    data_dir: Path | None = None,
    hidden: tuple[int, ...] = (1000, 1000, 1000),
    density: float = 0.045,
    rewire: Literal["gse", "rigl", "set", "none"] = "gse",
    fraction: float = 0.3,
    every: int = 100,
    epochs: int = 20,
    batch: int = 128,
    learning_rate: float = 0.001,
    weight_decay: float = 0.01,
    dropout: float = 0.3,
    original: bool = False,
    compare: Literal["auto", "dense", "none"] = "auto",
    seed: int = 0,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """A multilayer perceptron that stores, computes and learns its non-zeros only.

    Args:
        data: a built-in data set, or a folder or file of .npz, idx or CSV data.
        data_dir: where built-in data sets are looked for first.
        hidden: widths of the hidden layers.
        density: share of the weights that is kept, shared out by Erdos-Renyi.
        rewire: how connections move: guided (gse), steepest gradient (rigl), random (set), or not at all.
        fraction: of the connections that move each time, falling along a cosine to zero at three quarters of the training.
        every: steps from one move to the next.
        epochs: passes over the training data.
        batch: samples in a step.
        learning_rate: of AdamW at the start; it falls along a cosine to a hundredth.
        weight_decay: of AdamW.
        dropout: after each hidden layer.
        original: the recipe of arXiv 2102.01732 instead: momentum SGD 0.01, SET every epoch, epsilon 20, All-ReLU 0.6.
        compare: train the dense twin too: yes, no, or where it is small (auto).
        seed: of data order, places, weights and dropout.
        checkpoint_seconds: training time between two checkpoints within an epoch.
    """
    splits = standardize(load(data, data_dir=data_dir, seed=seed))
    widths = (splits.train.features, *hidden, splits.train.classes)
    dense_weights = sum(a * b for a, b in zip(widths, widths[1:]))
    steps = epochs * -(-len(splits.train) // batch)
    recipe: _Recipe
    if original:
        recipe = _original(seed, steps_per_epoch=steps // max(epochs, 1), steps=steps)
    else:
        grow = {"gse": guided, "rigl": steepest, "set": anywhere}.get(rewire)
        recipe = _Recipe(
            to_sparse=ToSparse(density=density),
            rewire=None
            if grow is None
            else lambda: Rewire(
                grow=grow,
                drop=smallest,
                fraction=cosine(fraction, end=0.0, steps=max(1, steps * 3 // 4)),
                every=every,
                until=steps * 3 // 4,
                seed=seed,
            ),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            dropout=dropout,
        )
    series = ["sparse"]
    if compare == "dense" or (compare == "auto" and dense_weights <= SMALL_WEIGHTS):
        series.append("dense")
    summary = run.summary() or {"data": _describe(splits), "series": {}}
    for name in series:
        if name in summary["series"]:  # finished before the run was resumed
            continue
        summary["series"][name] = _train(
            recipe,
            widths,
            splits,
            Journal(run, name),
            epochs=epochs,
            batch=batch,
            seed=seed,
            checkpoint_seconds=checkpoint_seconds,
        )
        run.write_summary(summary)
        write_report(run)
    return summary


@dataclass(frozen=True)
class _Recipe:
    """What differs between the default and the original recipe."""

    to_sparse: ToSparse
    rewire: Any
    learning_rate: float
    weight_decay: float
    dropout: float
    activation: Activation = relu
    original: bool = False

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.original:
            return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=0.9)
        groups = param_groups(model, weight_decay=self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)

    def methods(self, sparse: bool) -> list[Method]:
        moving = [self.rewire()] if sparse and self.rewire is not None else []
        return [Decay(self.weight_decay), *moving] if self.original else moving

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        if self.original or not steps:
            return None
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=self.learning_rate / 100)


def _original(seed: int, *, steps_per_epoch: int, steps: int) -> _Recipe:
    """Curci, Mocanu, Pechenizkiy 2021; the last layer is full at epsilon 20 and stays, and so does the last epoch's topology."""
    return _Recipe(
        to_sparse=ToSparse(epsilon=20.0),
        rewire=lambda: Rewire(
            grow=anywhere, drop=sign_split, fraction=0.3, every=max(1, steps_per_epoch), until=steps, seed=seed
        ),
        learning_rate=0.01,
        weight_decay=2e-4,
        dropout=0.3,
        activation=lambda layer: AllReLU(0.6, layer=layer),
        original=True,
    )


def _train(
    recipe: _Recipe,
    widths: Sequence[int],
    splits: Splits,
    journal: Journal,
    *,
    epochs: int,
    batch: int,
    seed: int,
    checkpoint_seconds: float,
) -> dict[str, Any]:
    sparse = journal.series == "sparse"
    torch.manual_seed(seed)
    model: nn.Module = mlp(*widths, activation=recipe.activation, dropout=recipe.dropout)
    if sparse:
        model = convert_(model, recipe.to_sparse).model
        model = convert_(model, FuseEpilogue()).model
    optimizer = recipe.optimizer(model)
    train = Batches(splits.train, batch, seed=seed)
    with measure() as cost:
        fitted = fit(
            model,
            optimizer,
            train,
            validation=splits.validation,
            epochs=epochs,
            methods=recipe.methods(sparse),
            scheduler=recipe.scheduler(optimizer, epochs * len(train)),
            journal=journal,
            checkpoint_seconds=checkpoint_seconds,
        )
    held = footprint(model, optimizer, all_gradients=True)
    outcome = _outcome(model, fitted, splits) | {
        "parameters": held.parameters,
        "weights_bytes": held.weights_bytes,
        "index_bytes": held.index_bytes,
        "gradient_bytes": held.gradient_bytes,
        "optimizer_bytes": held.optimizer_bytes,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "multiply_adds_per_sample": _multiply_adds(model, train),
        "joules": cost.joules,
    }
    if sparse:
        save_model(journal.run.path, model.state_dict(), _structure(model, widths))
    return outcome


def _outcome(model: nn.Module, fitted: Fitted, splits: Splits) -> dict[str, Any]:
    """The one look at the test set, with the weights that validation chose."""
    if fitted.best_state:
        model.load_state_dict(fitted.best_state)
    loss, accuracy = evaluate(model, splits.test)
    seconds = sorted(fitted.epoch_seconds)
    return {
        "test_accuracy": accuracy,
        "test_loss": loss,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.epoch,
        "seconds": fitted.seconds,
        "seconds_per_epoch": seconds[len(seconds) // 2] if seconds else None,
    }


def _multiply_adds(model: nn.Module, train: Batches) -> float:
    """Of forward and all gradients, for one sample, counted in one real step."""
    inputs, targets = next(train.epoch(0))
    with measure(dense_operations=True) as cost:
        nn.functional.cross_entropy(model(inputs), targets).backward()
    model.zero_grad()
    return cost.multiply_adds / len(targets)


def _structure(model: nn.Module, widths: Sequence[int]) -> dict[str, Any]:
    layers = {
        name: {
            "in_features": m.in_features,
            "out_features": m.out_features,
            "weights": m.weights,
            "slope": m.epilogue.slope,
        }
        for name, m in model.named_modules()
        if isinstance(m, SparseLinear)
    }
    return {"kind": "mlp", "widths": list(widths), "layers": layers}


def _describe(splits: Splits) -> dict[str, Any]:
    sizes = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    return {"name": splits.train.name, "features": splits.train.features, "classes": splits.train.classes, **sizes}
