"""The way from raw samples to train, validation and test: find the target, split the rows, make tensors."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from noctule.core.errors import DataError, UsageError
from noctule.core.place import nearest
from noctule.data.dataset import Dataset
from noctule.data.frame import MISSING, Arrays, Frame
from noctule.data.preparation import Preparation, Samples, fingerprint, fit_preparation
from noctule.data.splits import Splits, split_rows
from noctule.data.table import LABEL_NAMES
from noctule.data.target import Target, Task, fit_target

_TEST_SHARE = 0.2
_RARE = 3
"""A class with fewer samples stays in the training part as a whole."""


class Labelled(NamedTuple):
    """Samples without their target, the raw labels, and the target's name."""

    samples: Frame | Arrays
    labels: np.ndarray
    target: str

    def place(self, row: int) -> str:
        """Description of a row's place, for errors."""
        return self.samples.place(row)


def prepare(
    parts: Mapping[str, Samples],
    *,
    name: str,
    validation_fraction: float = 0.1,
    seed: int = 0,
    target: str | None = None,
    task: Task = "auto",
) -> Splits:
    """Make splits from raw samples, with a preparation learnt from the training part alone.

    Args:
        parts: train and, if there, validation and test.
        name: of the data set.
        validation_fraction: of train, if there is no validation part.
        seed: of that split.
        target: the column to predict; by default one called label, target, class or y, or else the last.
        task: classification or regression; by default decided from the target's values.

    Raises:
        DataError: wrong data; with the place.
        UsageError: there is no such column, or the task does not fit it.
    """
    labelled = {part: _labelled(samples, target) for part, samples in parts.items()}
    train = labelled["train"]
    if not len(train.samples):
        raise DataError(f"data set {name!r} has no train samples; give at least one")
    _check_columns(labelled)
    always = isinstance(train.samples, Arrays) and train.samples.always_classes and task == "auto"
    what = fit_target(train.target, train.labels, train.place, task="classification" if always else task)
    what = replace(what, why="") if always else what
    numbers = {part: what.encode(each.labels, each.place) for part, each in labelled.items()}
    for part, each in labelled.items():
        if len(numbers[part]) != len(each.samples):
            raise DataError(
                f"{part} part: {len(each.samples)} inputs but {len(numbers[part])} targets; give one target per row"
            )
    rows = split_rows(
        torch.from_numpy(numbers["train"]),
        validation=None if "validation" in parts else validation_fraction,
        test=None if "test" in parts else _TEST_SHARE,
        seed=seed,
        name=name,
        keep=_rare(numbers["train"]) if what.labels else None,
    )
    cut = {part: (train.samples.take(at.numpy()), numbers["train"][at.numpy()]) for part, at in rows.items()}
    cut |= {part: (labelled[part].samples, numbers[part]) for part in parts if part != "train"}
    preparation = fit_preparation(cut["train"][0], what, name=name)
    made = {}
    for part, (samples, targets) in cut.items():
        try:
            made[part] = Dataset(
                preparation.plain_inputs(samples), torch.from_numpy(targets), name=name, classes=len(what.labels)
            )
        except DataError as error:
            raise DataError(f"{part} part: {error}") from error
    _warn_of_lost_classes(made, what)
    return with_fingerprint(Splits(made["train"], made.get("validation"), made["test"], preparation))


def with_fingerprint(splits: Splits) -> Splits:
    """The splits with a checksum of all tensors in their preparation."""
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    mark = fingerprint([tensor for part in parts for tensor in (part.inputs, part.targets)])
    assert splits.preparation is not None
    return replace(splits, preparation=replace(splits.preparation, fingerprint=mark))


def find_target(frame: Frame, target: str | None) -> str:
    """The name of the column to predict.

    Raises:
        UsageError: `target` is none of the columns.
        DataError: several columns have a name of a target.
    """
    names = list(frame.columns)
    if target is not None:
        alike = [name for name in names if name.lower() == target.strip().lower()]
        if target in names or len(alike) == 1:
            return target if target in names else alike[0]
        raise UsageError(
            f"{frame.source} has no column {target!r}{nearest(target, names)}. Its columns: {', '.join(names[:30])}"
        )
    likely = [name for name in names if name.lower() in LABEL_NAMES] if frame.named else []
    if len(likely) > 1:
        both = ", ".join(map(repr, likely))
        raise DataError(f"{frame.source}: the columns {both} could each be the label; say which (--target), or rename")
    if likely:
        return likely[0]
    return next((name for name in reversed(names) if not _is_empty(frame.columns[name])), names[-1])


def target_of(samples: Samples, preparation: Preparation) -> tuple[Samples, np.ndarray | None]:
    """Samples to predict without their target, and the target, or None where it is missing.

    A target with gaps, or of another kind than in training, counts as missing.
    """
    name = preparation.target.name
    if isinstance(samples, Dataset):
        return samples, samples.targets.numpy()
    if isinstance(samples, Arrays):
        return samples, samples.labels
    if not preparation.is_table or name not in samples.columns:
        return samples, None
    known = sum(map(len, (preparation.columns, preparation.left_out))) + 1
    if not samples.named and len(samples.columns) != known:
        return samples, None
    return samples.without(name), samples.columns[name]


def _labelled(samples: Samples, target: str | None) -> Labelled:
    if isinstance(samples, Frame):
        if len(samples.columns) < 2:
            raise DataError(f"{samples.source} needs at least one feature and the label, but has one column")
        name = find_target(samples, target)
        return Labelled(samples.without(name), samples.columns[name], name)
    if target is not None:
        raise UsageError(
            "these data are no table, so there are no columns to name the target among: leave --target out"
        )
    if isinstance(samples, Dataset):
        arrays = Arrays(
            samples.inputs.numpy().reshape(len(samples), *(samples.shape or (-1,))), None, source="the data"
        )
        return Labelled(arrays, samples.targets.numpy(), "label")
    if samples.inputs.ndim < 2:
        raise DataError(f"{samples.source}: inputs of shape {samples.inputs.shape}; give (samples, features)")
    if samples.labels is None:
        raise DataError(f"{samples.source} has no labels; give one for each sample")
    return Labelled(samples, samples.labels, samples.label_name)


def _is_empty(values: np.ndarray) -> bool:
    """Whether all cells of a column are missing, as behind a separator at the end of each line."""
    return values.dtype == object and not any(text not in MISSING for text in values.tolist())


def _check_columns(labelled: Mapping[str, Labelled]) -> None:
    train = labelled["train"]
    for part, other in labelled.items():
        if not isinstance(train.samples, Frame) or part == "train":
            continue
        if not isinstance(other.samples, Frame):
            raise DataError(f"the {part} part is no table, as train is")
        differ = set(train.samples.columns) ^ set(other.samples.columns)
        if differ or other.target != train.target:
            raise DataError(
                f"{other.samples.source} and {train.samples.source} differ in their headers "
                f"({', '.join(sorted(differ)[:10]) or 'the target'}); give both the same columns"
            )


def _rare(numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((np.bincount(numbers) < _RARE)[numbers])


def _warn_of_lost_classes(made: Mapping[str, Dataset], target: Target) -> None:
    if not target.labels:
        return
    counts = {part: torch.bincount(each.targets, minlength=each.classes) for part, each in made.items()}
    warning = [
        f"no sample of {', '.join(str(target.labels[at]) for at in lost[:5])}"
        f"{f' and {len(lost) - 5} more classes' if len(lost) > 5 else ''} is in the {part} part"
        for part in made
        if (lost := (counts[part] == 0).nonzero()[:, 0].tolist())
    ]
    if warning:
        warnings.warn(f"data set {made['train'].name!r}: {'; '.join(warning)}", stacklevel=2)
