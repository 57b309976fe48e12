"""Predictions of a finished run for other data: the function behind ``noctule predict``."""

import csv
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn

from noctule.checkpoint import load_model
from noctule.checkpoint.atomic import replacing
from noctule.core.errors import DataError, UsageError
from noctule.data import read
from noctule.data.frame import Arrays
from noctule.data.names import DataSource
from noctule.data.preparation import Preparation, Samples
from noctule.data.prepare import target_of
from noctule.data.target import Label
from noctule.deploy.target import needed
from noctule.deploy.targets import of_file
from noctule.recipes.own_data import read_preparation
from noctule.recipes.sparse_cnn import network as cnn_of
from noctule.recipes.sparse_mlp import network as mlp_of
from noctule.report import RunFolder

_ROWS_AT_A_TIME = 1000


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions for samples, in their order."""

    labels: tuple[Label, ...]
    """The classes; none where numbers are predicted."""
    values: np.ndarray
    """Class numbers (rows,) int64, or numbers (rows,) float64 in the unit of the target."""
    probabilities: np.ndarray | None
    """Of each class, (rows, classes) float32."""
    files: Sequence[str] | None
    """The file of each sample, where each has its own."""
    score: tuple[str, float] | None
    """Accuracy or R2, where the samples came with their targets."""
    part: str
    """Which part of the data it is: train where there is only one."""

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.values)

    @property
    def names(self) -> list[Label]:
        """What is predicted for each sample: the label as it was in the training data, or the number."""
        return [self.labels[at] for at in self.values.tolist()] if self.labels else self.values.tolist()

    def write_csv(self, file: TextIO) -> None:
        """A line for each sample: the file if any, the prediction, and the probability of each class."""
        writer = csv.writer(file, lineterminator="\n")
        head = [*(["file"] if self.files else []), "prediction", *(f"probability_{label}" for label in self.labels)]
        writer.writerow(head)
        for row, name in enumerate(self.names):
            own = [] if self.probabilities is None else [f"{p:.6g}" for p in self.probabilities[row].tolist()]
            writer.writerow([*([self.files[row]] if self.files else []), name if self.labels else f"{name:.9g}", *own])


def predict(
    run: str | Path | RunFolder, data: DataSource, *, series: str = "sparse", data_dir: str | Path | None = None
) -> Predictions:
    """What the model of a finished run predicts, with the preparation and the scaling of its training.

    Args:
        run: its folder, or a file that `noctule.export` wrote, with the `data.json` of its training beside it.
        data: as `noctule.data.load` takes it, with or without the target; columns are matched by name. Of data with a
            test part that one is predicted, of others all.
        series: the sparse model, or its dense twin.
        data_dir: where built-in data sets are looked for first.

    Raises:
        UsageError: there is no such run, series or data.
        DataError: the data do not fit the model; it says how they differ.
        CheckpointError: the model's files are missing or damaged.
    """
    if not isinstance(run, RunFolder) and Path(run).is_file():
        model, preparation = _shipped(Path(run), series), read_preparation(Path(run).absolute().parent)
    else:
        folder = run if isinstance(run, RunFolder) else RunFolder(run)
        preparation, model = read_preparation(folder), trained_model(folder, series)
    part, samples, truth = _samples(preparation, data, data_dir)
    rows = _inputs(samples, preparation)
    with torch.inference_mode():
        outputs = torch.cat([model(inputs) for inputs in rows])
    files = samples.files if isinstance(samples, Arrays) else None
    labels = preparation.target.labels
    if labels:
        shares = outputs.softmax(1).numpy()
        values = outputs.argmax(1).numpy()
    else:
        shares = None
        values = outputs.flatten().double().numpy() * preparation.target_deviation + preparation.target_mean
    return Predictions(labels, values, shares, files, _score(values, truth, samples, preparation), part)


def prepared(
    file: Path, data: DataSource, *, data_dir: str | Path | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples as the inputs of a shipped file, and their class numbers if all of them have a known one.

    Raises:
        DataError: the data do not fit the model, or there is no `data.json` beside the file.
    """
    preparation = read_preparation(file.absolute().parent)
    _, samples, truth = _samples(preparation, data, data_dir)
    inputs = torch.cat([*_inputs(samples, preparation)]).numpy()
    if truth is None or not preparation.target.labels:
        return inputs, None
    try:
        return inputs, np.asarray(preparation.target.encode(truth, getattr(samples, "place", str)))
    except DataError:
        return inputs, None


def _samples(preparation: Preparation, data: DataSource, data_dir: str | Path | None) -> tuple[str, Samples, Any]:
    """The part of the data that is predicted, its samples and their targets if any."""
    found = read(data, data_dir=None if data_dir is None else Path(data_dir), like=preparation)
    part = next(part for part in ("test", "train", "validation") if part in found.parts)
    return part, *target_of(found.parts[part], preparation)


def print_predictions(run: Path, data: str, *, out: Path | None, series: str, data_dir: Path | None) -> None:
    """What ``noctule predict`` does: CSV to a file, or to standard output, and on the error output how many and how right."""
    if out is not None and out.is_dir():
        raise UsageError(f"{out} is a folder; name a file in it")
    predictions = predict(run, data, series=series, data_dir=data_dir)
    if out is None:
        _print(predictions)
    else:
        _write(out, predictions)
    where = "" if out is None else f", in {out}"
    part = "" if predictions.part == "train" else f" of the {predictions.part} part"
    many = f"{len(predictions)} prediction{'' if len(predictions) == 1 else 's'}"
    print(f"{many}{part}{where}", file=sys.stderr)
    if predictions.score:
        print(f"{predictions.score[0]} on these samples: {predictions.score[1]:.4f}", file=sys.stderr)


def _print(predictions: Predictions) -> None:
    try:
        predictions.write_csv(sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # whatever reads it, `head` say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(path: Path, predictions: Predictions) -> None:
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        predictions.write_csv(text)
        text.flush()
        text.detach()


def trained_model(folder: RunFolder, series: str) -> nn.Module:
    """The trained network, in evaluation mode."""
    builders = {"mlp": mlp_of, "cnn": cnn_of}
    path = folder.path if series == "sparse" else folder.path / f"{series}.safetensors"
    if not (folder.path / ("model.json" if series == "sparse" else f"{series}.json")).is_file():
        remedy = "go on with it by `noctule run --resume`" if series == "sparse" else "train with --compare dense"
        raise UsageError(f"{folder.path} holds no trained {series} model; {remedy}")
    state, structure = load_model(path)
    if structure.get("kind") not in builders:
        raise UsageError(
            f"{folder.path} is a run of {folder.about().get('recipe')}, whose models `noctule predict` cannot build; it does "
            "those of sparse_mlp and sparse_cnn. In Python: noctule.load_model"
        )
    model = builders[structure["kind"]](structure, sparse=bool(structure["layers"]))
    model.load_state_dict(state)
    return model.eval()


def _shipped(path: Path, series: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model of a file that was written for a runtime."""
    if series != "sparse":
        raise UsageError(f"{path} is one model: --series is for folders of runs")
    target = of_file(path)
    needed(target.module, target.needs)
    call = target.open(path, 1)
    return lambda inputs: torch.from_numpy(call(inputs.numpy()))


def _inputs(samples: Samples, preparation: Preparation) -> Iterator[torch.Tensor]:
    """The inputs of all samples, some at a time."""
    plain = preparation.plain_inputs(samples)
    for start in range(0, len(plain), _ROWS_AT_A_TIME):
        rows = plain[start : start + _ROWS_AT_A_TIME]
        wrong = ~torch.isfinite(rows.flatten(1)).all(1)
        if wrong.any():
            raise DataError(
                f"row {start + int(wrong.int().argmax())} of the data is not finite; repair or drop such rows"
            )
        yield preparation.standardized(rows)


def _score(
    values: np.ndarray, truth: np.ndarray | None, samples: Samples, preparation: Preparation
) -> tuple[str, float] | None:
    """The accuracy or R2, if every sample has its target and each class is known."""
    if truth is None:
        return None
    try:
        wanted = preparation.target.encode(truth, getattr(samples, "place", str))
    except DataError:
        return None
    if preparation.target.labels:
        return "accuracy", float((values == wanted).mean())
    spread = float(np.square(wanted - wanted.mean()).sum())
    return ("R2", 1.0 - float(np.square(values - wanted).sum()) / spread) if spread else None
