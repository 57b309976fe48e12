"""The difference of two accuracies on one test set, and its confidence interval."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noctule.data import Batches, Dataset, Windows


def accuracies(model: nn.Module, dataset: Dataset | Windows, *, batch_size: int = 1000) -> Tensor:
    """The accuracy of a network on each sample, (N,): the share of its targets predicted correctly, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            size = max(1, batch_size // (dataset.targets.numel() // len(dataset)))
            found = [
                (model(inputs).argmax(1) == targets).float().flatten(1 if targets.dim() > 1 else 0)
                for inputs, targets in Batches(dataset, size, seed=0, shuffle=False).epoch(0)
            ]
    finally:
        model.train(was_training)
    return torch.cat([part.mean(1) if part.dim() > 1 else part for part in found])


def difference(a: Path, b: Path) -> dict[str, Any] | None:
    """Difference of the accuracies in two files of `accuracies`, in percentage points, and half of its 95 % interval.

    Samples are paired: one that both networks get right, or wrong, adds nothing. Agresti, Min 2005, "Simple improved
    confidence intervals for comparing matched proportions": two samples more, on one of which they differ either way by halves.

    Returns:
        None where one of the files is missing, or of another test set.
    """
    if not (a.exists() and b.exists()):
        return None
    a_N, b_N = np.load(a), np.load(b)
    if a_N.shape != b_N.shape or not len(a_N):
        return None
    return interval(a_N - b_N)


def interval(differences_N: Any) -> dict[str, Any]:
    """The mean of paired differences (N,) in percentage points, and half of its 95 % interval.

    >>> found = interval(np.array([1.0] * 12 + [-1.0] * 10 + [0.0] * 978))
    >>> round(found["points"], 2), round(found["margin_points"], 2)
    (0.2, 0.94)
    """
    n, total, squares = len(differences_N), float(differences_N.sum()), float(np.square(differences_N).sum())
    more = n + 2
    variance = (squares + 1.0) / more - (total / more) ** 2
    return {
        "points": 100.0 * total / n,
        "margin_points": 100.0 * 1.96 * math.sqrt(max(variance, 0.0) / more),
        "samples": n,
    }
