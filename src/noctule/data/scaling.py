"""Standardisation: every feature to mean 0 and deviation 1, measured on the training part alone."""

from dataclasses import replace

import torch
from torch import Tensor

from noctule.data.dataset import Dataset
from noctule.data.preparation import with_scaling
from noctule.data.splits import Splits

_ROWS_AT_A_TIME = 512
_RELATIVE_FLOOR = 1e-8
"""Largest ratio of deviation to mean that is rounding, not variation: below the resolution of float32."""


def standardize(splits: Splits) -> Splits:
    """New splits with `(x - mean) / deviation` per feature, both taken from the train part.

    Tables and pictures alike are treated feature by feature (pixel by pixel), as in the original code of sparse
    evolutionary training. A feature that is constant in the train part becomes 0 everywhere. The targets of a
    regression are standardised too. The given splits do not change.
    """
    mean, deviation = _moments(splits.train.inputs)
    constant = deviation <= _RELATIVE_FLOOR * mean.abs()
    scale = torch.where(constant, 0.0, 1 / torch.where(constant, 1.0, deviation))

    target_mean, target_deviation = _of_targets(splits.train)

    def scaled(part: Dataset) -> Dataset:
        inputs = torch.empty_like(part.inputs)
        for rows in _chunks(part.inputs):
            inputs[rows] = (part.inputs[rows].double() - mean) * scale
        targets = part.targets if part.classes else ((part.targets.double() - target_mean) / target_deviation).float()
        return replace(part, inputs=inputs, targets=targets)

    preparation = splits.preparation
    if preparation is not None:
        preparation = replace(
            with_scaling(preparation, mean, scale), target_mean=target_mean, target_deviation=target_deviation
        )
    validation = None if splits.validation is None else scaled(splits.validation)
    return Splits(scaled(splits.train), validation, scaled(splits.test), preparation)


def _of_targets(train: Dataset) -> tuple[float, float]:
    """Mean and deviation of the targets of a regression."""
    if train.classes:
        return 0.0, 1.0
    targets = train.targets.double()
    return float(targets.mean()), float(targets.std(correction=0)) or 1.0


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the population deviation of each feature in float64, without a float64 copy of the whole set."""
    zeros = torch.zeros(inputs.shape[1], dtype=torch.float64, device=inputs.device)
    mean = sum((inputs[rows].sum(0, dtype=torch.float64) for rows in _chunks(inputs)), zeros) / len(inputs)
    squares = sum(((inputs[rows].double() - mean).square().sum(0) for rows in _chunks(inputs)), zeros)
    return mean, (squares / len(inputs)).sqrt()


def _chunks(inputs: Tensor) -> list[slice]:
    return [slice(start, start + _ROWS_AT_A_TIME) for start in range(0, len(inputs), _ROWS_AT_A_TIME)]
