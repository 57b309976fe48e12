"""Train a truly sparse multilayer perceptron, beside its dense twin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noctule.checkpoint import save_model
from noctule.core.convert import convert_
from noctule.core.method import Method
from noctule.core.optim import param_groups
from noctule.data import Batches, Task, load, standardize
from noctule.data.names import DataSource
from noctule.models import mlp
from noctule.models.mlp import Activation, relu
from noctule.recipes.own_data import describe, keep_preparation, print_preparation
from noctule.recipes.training import (
    GROWERS,
    Compare,
    Moving,
    falling_rate,
    falling_rewire,
    linear_layers,
    train_classifier,
    train_series,
)
from noctule.report import Journal, RunFolder
from noctule.sparse.layers import AllReLU, FuseEpilogue, ToSparse
from noctule.sparse.rewire import sign_split
from noctule.sparse.rewire.decay import Decay
from noctule.team import team


def sparse_mlp(
    run: RunFolder,
    *,
    data: DataSource = "digits",
    data_dir: Path | None = None,
    target: str | None = None,
    task: Task = "auto",
    hidden: tuple[int, ...] = (1000, 1000, 1000),
    epochs: int = 20,
    batch: int = 128,
    original: bool = False,
    density: float | None = None,
    rewire: Moving | None = None,
    fraction: float | None = None,
    every: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    dropout: float | None = None,
    validation: float = 0.1,
    compare: Compare = "auto",
    seed: int = 0,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """A multilayer perceptron that stores, computes and learns its non-zeros only.

    Args:
        data: a built-in data set, or your own: a CSV, Parquet, .npz or .npy file, a folder of such, of idx files, or of PNG or JPEG
            files in a folder for each class. From Python also what `noctule.data.load` takes: a DataFrame, (X, y), ...
        data_dir: where built-in data sets are looked for first.
        target: the column of a table to predict (default: one called label, target, class or y, or else the last).
        task: whether the target is classes or a number (auto: text and few whole numbers are classes).
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
        validation: share of the training data that selects the epoch, where the data bring no validation part; with 0 all are
            trained on and the last epoch is taken.
        compare: train the dense twin too: yes, no, or where it is small (auto).
        seed: of data order, places, weights and dropout.
        checkpoint_seconds: training time between two checkpoints within an epoch.
    """
    if batch < 1 or epochs < 0 or min(hidden, default=1) < 1:
        raise ValueError(
            f"batch and hidden widths must be at least 1 and epochs at least 0, got {batch}, {hidden} and {epochs}"
        )
    splits = standardize(
        load(data, data_dir=data_dir, seed=seed, validation_fraction=validation, target=target, task=task)
    )
    widths = (splits.train.features, *hidden, splits.train.outputs)
    print_preparation(run, splits)
    recipe = _preset(original).with_options(
        density=density,
        rewire=rewire,
        fraction=fraction,
        every=every,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        dropout=dropout,
    )
    batches = Batches(splits.train, batch, seed=seed)
    steps = epochs * len(batches)

    def methods(sparse: bool) -> list[Method]:
        return recipe.methods(sparse=sparse, steps_per_epoch=len(batches), steps=steps, seed=seed)

    def train(journal: Journal) -> dict[str, Any]:
        sparse = journal.series == "sparse"
        torch.manual_seed(seed)
        model = network(architecture, sparse=sparse)
        optimizer = recipe.optimizer(model, recipe)
        keep_preparation(run, splits)
        outcome = train_classifier(
            model,
            optimizer,
            batches,
            splits,
            epochs=epochs,
            methods=methods(sparse),
            scheduler=falling_rate(optimizer, steps) if recipe.falling else None,
            journal=journal,
            checkpoint_seconds=checkpoint_seconds,
        )
        path = run.path if sparse else run.path / "dense.safetensors"
        save_model(path, model.state_dict(), {**architecture, **names, "layers": linear_layers(model)})
        return outcome

    names = {"labels": describe(splits).get("labels")}
    architecture = {"kind": "mlp", "widths": list(widths), "original": original, "dropout": recipe.dropout}
    architecture |= {"density": recipe.density, "epsilon": recipe.epsilon}

    _ = recipe.to_sparse, methods(True)  # errors come before anything is trained or written
    if not 0.0 <= recipe.dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {recipe.dropout}")
    return train_series(
        run,
        train,
        about={"data": describe(splits)},
        compare=compare,
        dense_weights=sum(a * b for a, b in zip(widths, widths[1:])),
    )


def network(architecture: Mapping[str, Any], *, sparse: bool) -> nn.Module:
    """A new network of the architecture in `model.json`."""
    recipe = _preset(architecture["original"])
    recipe = replace(recipe, density=architecture["density"], epsilon=architecture["epsilon"])
    model = mlp(*architecture["widths"], activation=recipe.activation, dropout=architecture["dropout"])
    return convert_(convert_(model, recipe.to_sparse).model, FuseEpilogue()).model if sparse else model


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """The options in which the two presets differ."""

    density: float | None = None
    epsilon: float | None = None
    rewire: str
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
        every = self.every or steps_per_epoch
        if not self.falling:  # momentum SGD has no decoupled decay of its own
            methods.append(Decay(self.learning_rate * self.weight_decay))
        if not sparse or self.rewire == "none":
            return methods
        if self.falling:
            methods.extend(falling_rewire(self.rewire, fraction=self.fraction, every=every, steps=steps, seed=seed))
        else:
            grow = GROWERS[self.rewire]
            methods.extend(
                team().rewire(grow=grow, drop=sign_split, fraction=self.fraction, every=every, until=steps, seed=seed)
            )
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
        falling=True,
        every=200,
        learning_rate=0.002,
        weight_decay=0.01,
        dropout=0.15,
        activation=relu,
        optimizer=_adamw,
    )
