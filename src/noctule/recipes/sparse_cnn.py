"""Train a truly sparse convolutional network, beside its dense twin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noctule.checkpoint import save_model
from noctule.core.convert import convert_
from noctule.core.method import Method
from noctule.core.optim import param_groups
from noctule.data import Batches, Task, load
from noctule.data.augment import Augment, cutout, flip, shift
from noctule.data.names import DataSource
from noctule.models import cnn
from noctule.recipes.own_data import describe, keep_preparation, print_preparation
from noctule.recipes.training import Compare, Moving, falling_rate, falling_rewire, train_classifier, train_series
from noctule.report import Journal, RunFolder
from noctule.sparse.layers import FuseEpilogue, SparseLayer, ToSparse
from noctule.sparse.layers.keep_layout import KeepLayout


def sparse_cnn(
    run: RunFolder,
    *,
    data: DataSource = "digits",
    data_dir: Path | None = None,
    target: str | None = None,
    task: Task = "auto",
    channels: tuple[int, ...] = (32, 64, 128),
    convolutions: int = 2,
    epochs: int = 10,
    batch: int = 128,
    density: float = 0.05,
    rewire: Moving = "gse",
    fraction: float = 0.3,
    every: int = 100,
    learning_rate: float = 0.005,
    weight_decay: float = 0.01,
    dropout: float = 0.0,
    shift: int = 0,
    flip: bool = False,
    cutout: int = 0,
    validation: float = 0.1,
    compare: Compare = "auto",
    seed: int = 0,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """A convolutional network that stores, computes and learns its non-zeros only.

    Args:
        data: a built-in data set of images, or your own: a folder of PNG or JPEG files in a folder for each class, an .npz
            file, or a folder of idx files. From Python also what `noctule.data.load` takes: (X, y), ...
        data_dir: where built-in data sets are looked for first.
        target: the column of a table to predict (default: one called label, target, class or y, or else the last).
        task: whether the target is classes or a number (auto: text and few whole numbers are classes).
        channels: of each stage; every stage ends by halving the image.
        convolutions: in each stage.
        epochs: passes over the training data.
        batch: samples in a step; an incomplete last batch is left out of an epoch.
        density: share of the weights that is kept, shared out by Erdos-Renyi.
        rewire: how connections move: guided (gse), steepest gradient (rigl), random (set), or not at all.
        fraction: of the connections that move each time, falling along a cosine to zero at three quarters of the training.
        every: steps from one move to the next.
        learning_rate: at the start; it falls along a cosine to a hundredth.
        weight_decay: decoupled from the gradient, times the learning rate.
        dropout: before the last layer.
        shift: pixels by which training images are moved at most, up or down and left or right.
        flip: mirror half of the training images, left for right.
        cutout: side of a square that is cut out of each training image.
        validation: share of the training data that selects the epoch, where the data bring no validation part; with 0 all are
            trained on and the last epoch is taken.
        compare: train the dense twin too: yes, no, or where it is small (auto).
        seed: of data order, augmentation, places, weights and dropout.
        checkpoint_seconds: training time between two checkpoints within an epoch.
    """
    if batch < 2 or epochs < 0:
        raise ValueError(f"batch must be at least 2 and epochs at least 0, got {batch} and {epochs}")
    if min(shift, cutout) < 0:
        raise ValueError(f"shift and cutout must be at least 0 pixels, got {shift} and {cutout}")
    # Pixels stay as they are: the network scales them itself, so that zero is black, which shifts and cuts fill with.
    splits = load(data, data_dir=data_dir, seed=seed, validation_fraction=validation, target=target, task=task)
    shape, classes = splits.train.image_shape, splits.train.outputs
    print_preparation(run, splits)
    augment = _augment(shift, flip, cutout)
    batches = Batches(splits.train, batch, seed=seed, drop_last=True, augment=augment)  # one sample has no variance
    steps = epochs * len(batches)
    moving: list[Method] = []
    if rewire != "none":
        moving.extend(falling_rewire(rewire, fraction=fraction, every=every, steps=steps, seed=seed))

    def train(journal: Journal) -> dict[str, Any]:
        sparse = journal.series == "sparse"
        torch.manual_seed(seed)
        model = network(architecture, sparse=sparse)
        optimizer = torch.optim.AdamW(param_groups(model, weight_decay=weight_decay), lr=learning_rate, fused=True)
        keep_preparation(run, splits)
        outcome = train_classifier(
            model,
            optimizer,
            batches,
            splits,
            epochs=epochs,
            methods=moving if sparse else [],
            scheduler=falling_rate(optimizer, steps),
            journal=journal,
            checkpoint_seconds=checkpoint_seconds,
        )
        path = run.path if sparse else run.path / "dense.safetensors"
        save_model(path, model.state_dict(), {**architecture, **names, "layers": _layers(model)})
        return outcome

    names = {"labels": describe(splits).get("labels")}
    architecture = {"kind": "cnn", "shape": list(shape), "classes": classes}
    architecture |= {"channels": list(channels), "convolutions": convolutions, "dropout": dropout, "density": density}
    ToSparse(density=density)  # raises for an impossible density
    return train_series(
        run,
        train,
        about={"data": describe(splits)},
        compare=compare,
        dense_weights=sum(p.numel() for p in network(architecture, sparse=False).parameters() if p.dim() > 1),
    )


def network(architecture: Mapping[str, Any], *, sparse: bool) -> nn.Module:
    """A new network of the architecture in `model.json`."""
    sizes = {name: architecture[name] for name in ("channels", "convolutions", "dropout")}
    model: nn.Module = cnn(tuple(architecture["shape"]), architecture["classes"], **sizes)
    if sparse:
        for rule in (ToSparse(density=architecture["density"]), FuseEpilogue(), KeepLayout()):
            model = convert_(model, rule).model
    return model


def _augment(pixels: int, mirror: bool, side: int) -> Augment | None:
    """The requested augmentations, one after the other."""

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        if pixels:
            images = shift(images, generator, pixels=pixels)
        if mirror:
            images = flip(images, generator)
        return cutout(images, generator, size=side) if side else images

    return augment if pixels or mirror or side else None


def _layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: {
            "kind": type(m).__name__,
            "shape": list(m.topology.shape),
            "weights": m.weights,
            "slope": m.epilogue.slope,
        }
        for name, m in model.named_modules()
        if isinstance(m, SparseLayer)
    }
