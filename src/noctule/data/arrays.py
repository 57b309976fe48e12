"""From the arrays that files hold to data sets: inputs to float32, labels to class numbers, alike for every format."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from noctule.data.dataset import Dataset
from noctule.errors import DataError

PARTS = ("train", "validation", "test")

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
"""(inputs, labels) by part."""

_FEW_CLASSES = 1000
"""Up to here a class number may exceed the number of samples, as in a small extract of a large set."""
_LARGEST_EXACT = 2**53


def make_parts(parts: Arrays, *, name: str) -> dict[str, Dataset]:
    """Data sets from (inputs, labels) by part; one part is called train, and it says which classes there are.

    Labels that are text other than numbers stand for the sorted distinct ones of the train part. Pictures of bytes
    (uint8, two or more dimensions per sample) are scaled to 0 .. 1; all else is taken as it is.

    Raises:
        DataError: inputs or labels that cannot be; naming the set, the part and the row.
    """
    numbers, classes = class_numbers({part: labels for part, (_, labels) in parts.items()}, name=name)
    made = {}
    for part, (inputs, _) in parts.items():
        try:
            made[part] = Dataset(to_inputs(inputs), torch.from_numpy(numbers[part]), name=name, classes=classes)
        except DataError as error:
            raise DataError(f"{part} part: {error}") from error
    return made


def to_inputs(inputs: np.ndarray) -> Tensor:
    """Inputs as float32 of the same shape; pictures of bytes scaled to 0 .. 1."""
    if inputs.dtype.kind not in "biuf":
        raise DataError(f"the inputs are of type {inputs.dtype}; give numbers")
    if inputs.dtype == np.uint8 and inputs.ndim > 2:
        return torch.from_numpy(np.ascontiguousarray(inputs)) / 255
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which Dataset reports with its row
        return torch.from_numpy(inputs.astype(np.float32, order="C"))


def class_numbers(labels: Mapping[str, np.ndarray], *, name: str) -> tuple[dict[str, np.ndarray], int]:
    """The labels of each part as int64 class numbers, and how many classes the train part has."""
    columns = {part: _column(values, f"data set {name!r}, {part} part") for part, values in labels.items()}
    if not columns["train"].size:
        raise DataError(f"data set {name!r} has no train samples; give at least one")
    if any(column.dtype.kind == "O" for column in columns.values()):
        texts = {part: [str(value) for value in column] for part, column in columns.items()}
        if not all(_is_number(text) for column in texts.values() for text in column):
            return _numbered_by_name(texts, name)
        columns = {part: np.array([float(text) for text in column]) for part, column in texts.items()}
    numbers = {part: _whole(column, f"data set {name!r}, {part} part") for part, column in columns.items()}
    train = numbers["train"]
    classes = max(int(train.max()) + 1, 1)
    if classes > max(len(train), _FEW_CLASSES):
        raise DataError(
            f"data set {name!r} has the label {classes - 1} in row {int(train.argmax())} of the train part but only "
            f"{len(train)} samples: labels must be class numbers counted from 0, not measurements or keys"
        )
    return numbers, classes


def _numbered_by_name(texts: Mapping[str, list[str]], name: str) -> tuple[dict[str, np.ndarray], int]:
    number = {text: position for position, text in enumerate(sorted(set(texts["train"])))}
    for part, column in texts.items():
        for row, text in enumerate(column):
            if text not in number:
                raise DataError(
                    f"data set {name!r} has the label {text[:80]!r} in row {row} of the {part} part, which no train "
                    "sample has; correct it, or add train samples of this class"
                )
    return {part: np.array([number[text] for text in column]) for part, column in texts.items()}, len(number)


def _column(values: np.ndarray, where: str) -> np.ndarray:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(
            f"{where}: labels of shape {values.shape}; give one class number per sample (argmax of one-hot)"
        )
    if values.dtype.kind not in "biufUO":
        raise DataError(f"{where}: labels of type {values.dtype}; give integers or text")
    return values.astype(object) if values.dtype.kind == "U" else values


def _whole(column: np.ndarray, where: str) -> np.ndarray:
    wide = column.astype(np.float64)
    wrong = ~(np.abs(wide) < _LARGEST_EXACT) | (np.floor(wide) != wide)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{where}: the label {column[row]} in row {row} is no class; give whole numbers from 0, or text"
        )
    return column.astype(np.int64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
