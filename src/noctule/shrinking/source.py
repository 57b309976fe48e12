"""The model that is to become smaller, and the data that it learnt from: of a finished run, a shipped one, or a user's function."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule.checkpoint import load_model, save_model
from noctule.core.errors import DataError, UsageError
from noctule.core.method import Method
from noctule.core.optim import param_groups
from noctule.data import Batches, Splits, load, standardize
from noctule.data.preparation import Preparation
from noctule.models import cnn, mlp, resnet
from noctule.recipes.own_data import read_preparation
from noctule.recipes.sparse_mlp import network as sparse_network
from noctule.recipes.training import falling_rate, falling_rewire
from noctule.report import RunFolder
from noctule.sparse.layers import SparseLayer
from noctule.train.fit import Loss, fit

HIDDEN = (1000, 1000, 1000)
BATCH, RATE = 128, 2e-3
_SPARSE = {"original": False, "density": 0.045, "epsilon": None, "dropout": 0.15}

SHIPPED = ("mlp", "sparse_mlp", "cnn", "resnet")
"""Names of models that are trained first: three hidden layers of 1000, dense or at 4.5 %, `cnn`, and a ResNet-8."""


@dataclass(frozen=True)
class Source:
    """A model with its data."""

    model: nn.Module
    splits: Splits
    trained: bool
    """False where it is new."""

    @property
    def sparse(self) -> bool:
        """Whether it stores its non-zeros only."""
        return any(isinstance(module, SparseLayer) for module in self.model.modules())

    @property
    def validation(self) -> Any:
        """The validation part."""
        return self.splits.validation

    def batches(self, seed: int) -> Batches:
        """Batches of the training part."""
        train = self.splits.train  # a batch of one sample has no variance, which batch norms need
        return Batches(train, BATCH, seed=seed, drop_last=len(train) > BATCH)

    def ready(self, folder: Path, *, epochs: int, seed: int) -> "Source":
        """The source with a trained model: trained now and kept in the folder, or the one that is there."""
        if self.trained:
            return self
        path = folder / "source.safetensors"
        if not path.exists():
            torch.manual_seed(seed)
            batches = self.batches(seed)
            steps = epochs * len(batches)
            methods: Sequence[Method] = ()
            if self.sparse:
                methods = falling_rewire("gse", fraction=0.3, every=200, steps=steps, seed=seed)
            train(self.model, batches, self.validation, epochs=epochs, methods=methods, best=True)
            save_model(path, self.model.state_dict(), {})
        try:
            self.model.load_state_dict(load_model(path)[0])
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{path} is another model than this command's: give another --out ({error})") from error
        return replace(self, trained=True)


def train(
    model: nn.Module,
    batches: Any,
    validation: Any,
    *,
    epochs: int,
    loss_fn: Loss = F.cross_entropy,
    methods: Sequence[Method] = (),
    best: bool = False,
) -> float:
    """Train by AdamW with a rate that falls along a cosine, and return the seconds; the last epoch or the best one stays."""
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.01), lr=RATE)
    falling = falling_rate(optimizer, epochs * len(batches))
    how: dict[str, Any] = {"loss_fn": loss_fn, "methods": methods, "scheduler": falling}
    fitted = fit(model, optimizer, batches, validation=validation, epochs=epochs, **how)
    if best and fitted.best_state:
        model.load_state_dict(fitted.best_state)
    model.eval()
    return fitted.seconds


def of_name(name: str, data: str, *, data_dir: Path | None, seed: int) -> Source:
    """A shipped model, new, for a data set."""
    splits = _checked(standardize(load(data, data_dir=data_dir, seed=seed)))
    inputs, classes = splits.train.features, splits.train.classes
    torch.manual_seed(seed)
    if name == "mlp":
        model: nn.Module = mlp(inputs, *HIDDEN, classes)
    elif name == "sparse_mlp":
        model = sparse_network({**_SPARSE, "widths": [inputs, *HIDDEN, classes]}, sparse=True)
    else:
        shape = splits.train.image_shape
        model = cnn(shape, classes) if name == "cnn" else resnet(shape, classes, depth=8)
    return Source(model, splits, trained=False)


def of_function(function: Callable[..., Any], name: str, data: str, *, data_dir: Path | None, seed: int) -> Source:
    """What a user's function makes, new, of the classes and (C, H, W), or where it says ``features`` their number.

    Raises:
        UsageError: the function fails, or makes no module from (B, features) to (B, classes).
    """
    splits = _checked(standardize(load(data, data_dir=data_dir, seed=seed)))
    train = splits.train
    of_images = train.shape is not None and next(iter(inspect.signature(function).parameters), "") != "features"
    torch.manual_seed(seed)
    try:
        model = function(train.image_shape if of_images else train.features, train.classes)
        if not isinstance(model, nn.Module):
            raise TypeError(f"it returned {type(model).__name__}, not a torch module")
        with torch.no_grad():
            outputs = model.eval()(train.inputs[:2])
        if getattr(outputs, "shape", None) != (2, train.classes):
            given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(f"its model gives {given} for 2 samples of {train.classes} classes")
    except Exception as error:  # of any kind: the function is the user's
        raise UsageError(
            f"{name} makes no model from (B, {train.features}) to (B, {train.classes}): {type(error).__name__}: {error}"
        ) from error
    return Source(model, splits, trained=False)


def of_run(model: nn.Module, run: Path, data: str, *, data_dir: Path | None) -> Source:
    """The trained model of a finished run with the data of its training, cut and prepared as then.

    Raises:
        UsageError: the run had no validation part.
        DataError: the data are others than those of the run.
    """
    folder = RunFolder(run)
    options, preparation = folder.about()["options"], read_preparation(folder)
    cut = {"seed": options["seed"], "validation_fraction": options["validation"]}
    splits = load(data, data_dir=data_dir, target=options.get("target"), task=options.get("task", "auto"), **cut)
    if splits.validation is None:
        raise UsageError(
            f"{run} was trained without a validation part, which chooses here: train with --validation 0.1"
        )
    own = splits.preparation
    if own is None or _marks(own) != _marks(preparation):
        raise DataError(
            f"{data} are not the data that {run} was trained with, {preparation.name}: name those with --data"
        )
    splits = standardize(splits) if preparation.mean else splits
    return Source(model, _checked(splits), trained=True)


def _marks(preparation: Preparation) -> str:
    """What tells data apart: a checksum, or the name of a built-in set."""
    return preparation.fingerprint or preparation.name


def _checked(splits: Splits) -> Splits:
    if not splits.train.classes:
        raise UsageError(f"{splits.train.name} has numbers to predict; noctule shrink takes data with classes")
    if splits.validation is None:
        raise UsageError(f"{splits.train.name} has no validation part, which chooses here")
    return splits
