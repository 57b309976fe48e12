"""Conversion of the arrays in files to tensors, alike for every format, and to the built-in data sets."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from noctule.core.errors import DataError
from noctule.data.dataset import Dataset

PARTS = ("train", "validation", "test")


def make_parts(parts: Mapping[str, tuple[np.ndarray, np.ndarray]], *, name: str) -> dict[str, Dataset]:
    """Data sets from inputs and class numbers by part; the number of classes comes from the train part."""
    classes = int(parts["train"][1].max()) + 1
    return {
        part: Dataset(to_inputs(inputs), torch.from_numpy(labels.astype(np.int64)), name=name, classes=classes)
        for part, (inputs, labels) in parts.items()
    }


def to_inputs(inputs: np.ndarray) -> Tensor:
    """Inputs as float32 of the same shape; pictures of bytes scaled to 0 .. 1."""
    if inputs.dtype.kind not in "biuf":
        raise DataError(f"the inputs are of type {inputs.dtype}; give numbers")
    if inputs.dtype == np.uint8 and inputs.ndim > 2:
        return torch.from_numpy(np.ascontiguousarray(inputs)) / 255
    with np.errstate(
        over="ignore"
    ):  # numbers too large for float32 become infinite, which Dataset reports with the row
        return torch.from_numpy(inputs.astype(np.float32, order="C"))
