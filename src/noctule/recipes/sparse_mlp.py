"""Train a truly sparse multilayer perceptron, beside its dense twin."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from noctule.rewire import Drop, Grow, Rewire, anywhere, guided, sign_split, smallest, steepest
from noctule.schedule import constant, cosine
from noctule.types import Schedule

SMALL_WEIGHTS = 10_000_000
"""A dense twin of at most so many weights is trained too, unless told otherwise."""

GROWERS: dict[str, Grow] = {"gse": guided, "rigl": steepest, "set": anywhere}


def sparse_mlp(
    run: RunFolder,
    *,
    data: str = "digits",
    data_dir: Path | None = None,
    hidden: tuple[int, ...] = (1000, 1000, 1000),
    epochs: int = 20,
    batch: int = 128,
    original: bool = False,
    density: float | None = None,
    rewire: Literal["gse", "rigl", "set", "none"] | None = None,
    fraction: float | None = None,
    every: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    dropout: float | None = None,
    validation: float = 0.1,
    compare: Literal["auto", "dense", "none"] = "auto",
    seed: int = 0,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """A multilayer perceptron that stores, computes and learns its non-zeros only.

    Args:
        data: a built-in data set, or a folder or file of .npz, idx or CSV data.
        data_dir: where built-in data sets are looked for first.
        hidden: widths of the hidden layers.
        epochs: passes over the training data.
        batch: samples in a step.
        original: the recipe of arXiv 2102.01732: momentum SGD, All-ReLU 0.6, SET after every epoch; else AdamW, ReLU, and GSE on a
            fraction that falls along a cosine to zero at three quarters of the training.
        density: share of the weights that is kept, shared out by Erdos-Renyi (default: 0.045; original: epsilon 20).
        rewire: how connections move: guided (gse), steepest gradient (rigl), random (set), or not at all (default: gse; original:
            set).
        fraction: of the connections that move each time (default: 0.3).
        every: steps from one move to the next (default: 200; original: an epoch).
        learning_rate: at the start (default: 0.002, which falls along a cosine to a hundredth; original: 0.01, constant).
        weight_decay: decoupled from the gradient, times the learning rate (default: 0.01; original: 0.0002).
        dropout: after each hidden layer (default: 0.15; original: 0.3).
        validation: share of the training data that selects the epoch, where the data bring no validation part.
        compare: train the dense twin too: yes, no, or where it is small (auto).
        seed: of data order, places, weights and dropout.
        checkpoint_seconds: training time between two checkpoints within an epoch.
    """
    if batch < 1 or epochs < 0 or min(hidden, default=1) < 1:
        raise ValueError(
            f"batch and hidden widths must be at least 1 and epochs at least 0, got {batch}, {hidden} and {epochs}"
        )
    splits = standardize(load(data, data_dir=data_dir, seed=seed, validation_fraction=validation))
    widths = (splits.train.features, *hidden, splits.train.classes)
    recipe = _preset(original).with_options(
        density=density,
        rewire=rewire,
        fraction=fraction,
        every=every,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        dropout=dropout,
    )
    training = _Training(
        recipe, widths, splits, Batches(splits.train, batch, seed=seed), epochs, seed, checkpoint_seconds
    )
    training.check()
    series = ["sparse"]
    if compare == "dense" or (compare == "auto" and sum(a * b for a, b in zip(widths, widths[1:])) <= SMALL_WEIGHTS):
        series.append("dense")
    summary = run.summary() or {"data": _describe(splits), "series": {}}
    for name in series:
        if name in summary["series"]:  # finished before the run was resumed
            continue
        summary["series"][name] = training.run(Journal(run, name))
        run.write_summary(summary)
        write_report(run)
    return summary


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What the two presets differ in, and what the user's options change."""

    density: float | None = None
    epsilon: float | None = None
    rewire: str
    drop: Drop
    falling: bool
    fraction: float = 0.3
    every: int | None
    learning_rate: float
    weight_decay: float
    dropout: float
    activation: Activation
    optimizer: Callable[[nn.Module, "_Recipe"], torch.optim.Optimizer]

    def with_options(self, **options: Any) -> "_Recipe":
        given = {name: value for name, value in options.items() if value is not None}
        if "density" in given:
            given["epsilon"] = None
        return replace(self, **given)

    @property
    def to_sparse(self) -> ToSparse:
        return ToSparse(density=self.density, epsilon=self.epsilon)

    def methods(self, *, sparse: bool, steps_per_epoch: int, steps: int, seed: int) -> list[Method]:
        methods: list[Method] = []
        if not self.falling:  # momentum SGD has no decoupled decay of its own
            methods.append(Decay(self.learning_rate * self.weight_decay))
        if sparse and self.rewire != "none":
            until = max(1, steps * 3 // 4) if self.falling else steps
            fraction: Schedule = (
                cosine(self.fraction, end=0.0, steps=until) if self.falling else constant(self.fraction)
            )
            every = self.every or steps_per_epoch
            grow = GROWERS[self.rewire]
            methods.append(Rewire(grow=grow, drop=self.drop, fraction=fraction, every=every, until=until, seed=seed))
        return methods


def _adamw(model: nn.Module, recipe: _Recipe) -> torch.optim.Optimizer:
    groups = param_groups(model, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def _momentum(model: nn.Module, recipe: _Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=0.9, fused=True)


def _preset(original: bool) -> _Recipe:
    """The default recipe, or that of Curci, Mocanu, Pechenizkiy 2021.

    Differs from their script: the decay is times the learning rate (there 2e-4 of each weight is lost at every step, which holds
    accuracy below the authors' figures), new connections start at zero, weights are scaled to the sparse fan-in.
    """
    if original:
        return _Recipe(
            epsilon=20.0,
            rewire="set",
            drop=sign_split,
            falling=False,
            every=None,
            learning_rate=0.01,
            weight_decay=2e-4,
            dropout=0.3,
            activation=lambda layer: AllReLU(0.6, layer=layer),
            optimizer=_momentum,
        )
    return _Recipe(
        density=0.045,
        rewire="gse",
        drop=smallest,
        falling=True,
        every=200,
        learning_rate=0.002,
        weight_decay=0.01,
        dropout=0.15,
        activation=relu,
        optimizer=_adamw,
    )


@dataclass(frozen=True)
class _Training:
    """One recipe on one data set, for the sparse network and for its dense twin."""

    recipe: _Recipe
    widths: tuple[int, ...]
    splits: Splits
    train: Batches
    epochs: int
    seed: int
    checkpoint_seconds: float

    @property
    def steps(self) -> int:
        return self.epochs * len(self.train)

    def methods(self, sparse: bool) -> list[Method]:
        return self.recipe.methods(sparse=sparse, steps_per_epoch=len(self.train), steps=self.steps, seed=self.seed)

    def check(self) -> None:
        """Refuse what cannot be before anything is trained or written."""
        _ = self.recipe.to_sparse, self.methods(True)
        if not 0.0 <= self.recipe.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.recipe.dropout}")

    def model(self, sparse: bool) -> nn.Module:
        torch.manual_seed(self.seed)
        model: nn.Module = mlp(*self.widths, activation=self.recipe.activation, dropout=self.recipe.dropout)
        if not sparse:
            return model
        return convert_(convert_(model, self.recipe.to_sparse).model, FuseEpilogue()).model

    def run(self, journal: Journal) -> dict[str, Any]:
        """Train, read the test set once, and say what it took."""
        sparse = journal.series == "sparse"
        model = self.model(sparse)
        optimizer = self.recipe.optimizer(model, self.recipe)
        scheduler = None
        if self.recipe.falling and self.steps:
            floor = self.recipe.learning_rate / 100
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, eta_min=floor)
        with measure() as cost:
            fitted = fit(
                model,
                optimizer,
                self.train,
                validation=self.splits.validation,
                epochs=self.epochs,
                methods=self.methods(sparse),
                scheduler=scheduler,
                journal=journal,
                checkpoint_seconds=self.checkpoint_seconds,
            )
        held = footprint(model, optimizer, all_gradients=True)
        outcome = _outcome(model, fitted, self.splits) | {
            "parameters": held.parameters,
            "weights_bytes": held.weights_bytes,
            "index_bytes": held.index_bytes,
            "gradient_bytes": held.gradient_bytes,
            "optimizer_bytes": held.optimizer_bytes,
            "peak_memory_bytes": cost.peak_memory_bytes,
            "multiply_adds_per_sample": _multiply_adds(model, self.train),
            "joules": cost.joules,
        }
        if sparse:
            save_model(journal.run.path, model.state_dict(), _structure(model, self.widths))
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


def _structure(model: nn.Module, widths: tuple[int, ...]) -> dict[str, Any]:
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
