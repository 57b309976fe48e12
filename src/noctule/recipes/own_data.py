"""The data of a recipe: their preparation, printed and stored with the run, and the loss and errors that fit them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noctule.checkpoint.atomic import replacing
from noctule.core.errors import DataError
from noctule.data import Dataset, Splits, Text, Windows
from noctule.data.preparation import Preparation
from noctule.report import RunFolder
from noctule.train.fit import Loss

FILE = "data.json"
"""File in a run's folder with the preparation: how samples become tensors, learnt from the training part."""


def keep_preparation(run: RunFolder | Path, splits: Splits) -> None:
    """Write `data.json` into the folder of a run or of shipped files, or compare it with the one that is there.

    Raises:
        DataError: a resumed run has other data than at its start.
    """
    preparation = splits.preparation
    if preparation is None:
        return
    folder = run if isinstance(run, Path) else run.path
    path = folder / FILE
    if path.exists():
        if read_preparation(folder).fingerprint != preparation.fingerprint:
            raise DataError(
                f"the data {preparation.name!r} are not those that {folder} began with: put those back, or start a new run"
            )
        return
    with replacing(path) as file:
        file.write(json.dumps(preparation.to_json(), indent=1).encode())


def read_preparation(run: RunFolder | Path) -> Preparation:
    """Read the `data.json` of a run, or of the folder of a shipped file.

    Raises:
        DataError: the file is missing or damaged.
    """
    folder = run if isinstance(run, Path) else run.path
    path = folder / FILE
    try:
        return Preparation.from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise DataError(
            f"{folder} does not say how its data were prepared ({error.strerror}: {FILE}): its recipe keeps no such file, nothing "
            "was trained yet, or a shipped file was taken away from it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); train again") from error


def print_preparation(run: RunFolder, splits: Splits) -> None:
    """Print how the user's own data are prepared, once for all workers."""
    preparation = splits.preparation
    if preparation is None or "worker" in run.about():
        return
    if preparation.describe() or splits.validation is None:
        print(splits.describe(), flush=True)


def describe(splits: Splits | Text) -> dict[str, Any]:
    """Name, sizes and target of a data set, for the summary."""
    parts = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    sizes = {name: 0 if part is None else len(part) for name, part in parts.items()}
    about = {"name": splits.train.name, "features": splits.train.features, "classes": splits.train.classes, **sizes}
    preparation = splits.preparation if isinstance(splits, Splits) else None
    if preparation is not None and preparation.describe():
        about |= {"target": preparation.target.name, "task": preparation.target.task}
        about |= {"labels": list(preparation.target.labels)} if preparation.target.labels else {}
    return about


def loss_for(data: Dataset | Windows) -> Loss:
    """Cross-entropy for classes, the squared error for numbers."""
    return nn.functional.cross_entropy if data.classes else squared_error


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean square of the difference, of outputs (B, 1) and targets (B,)."""
    return nn.functional.mse_loss(outputs.flatten(), targets)


@torch.no_grad()
def regression_errors(model: nn.Module, splits: Splits) -> dict[str, float]:
    """Root of the mean squared error and mean absolute error on the test part, in the unit of the target."""
    deviation = 1.0 if splits.preparation is None else splits.preparation.target_deviation
    model.eval()
    away = [
        model(inputs).flatten() - targets
        for inputs, targets in zip(splits.test.inputs.split(1000), splits.test.targets.split(1000), strict=True)
    ]
    off = torch.cat(away).double() * deviation
    model.train()
    return {"test_rmse": float(off.square().mean().sqrt()), "test_mae": float(off.abs().mean())}
