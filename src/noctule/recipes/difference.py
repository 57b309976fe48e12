"""How far two accuracies lie apart on one test set, and how far that is from chance."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noctule.data import Batches, Dataset, Windows


def right(model: nn.Module, dataset: Dataset | Windows, *, batch_size: int = 1000) -> Tensor:
    """(N,): of each sample the share of its targets that a network guesses right, in evaluation mode."""
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


def keep(path: Path, right_N: Tensor) -> None:
    """Write what `right` gave to a file."""
    np.save(path, right_N.numpy())


def difference(a: Path, b: Path) -> dict[str, Any] | None:
    """How many points the first network is more accurate than the second, and half of the 95 % interval of that.

    Samples are paired: what both get right, or wrong, says nothing about the difference. Agresti, Min 2005, "Simple improved
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
    """The same of the differences, sample by sample.

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
