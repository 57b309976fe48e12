"""Which connections go."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Drop = Callable[[Tensor, float], Tensor]
"""Values (N,) and the fraction to drop -> the slots that go, int64, each once, in any order."""


def smallest(values: Tensor, fraction: float) -> Tensor:
    """The fraction with the smallest |value|; on the CPU, of equals the first.

    >>> smallest(torch.tensor([3.0, -1.0, 0.5, -2.0]), 0.5).sort().values
    tensor([1, 2])
    """
    count, sizes = int(fraction * values.numel()), values.detach().abs()
    if not count or not sizes.is_cpu:
        return sizes.topk(count, largest=False, sorted=False).indices
    known = (sizes.float() if sizes.dtype is torch.bfloat16 else sizes).numpy()  # which takes a fifth of the time
    bound = np.partition(known, count - 1)[count - 1]
    if np.isnan(bound):
        return sizes.topk(count, largest=False, sorted=False).indices
    below, equal = np.flatnonzero(known < bound), np.flatnonzero(known == bound)
    return torch.from_numpy(np.concatenate([below, equal[: count - below.size]]))


def sign_split(values: Tensor, fraction: float) -> Tensor:
    """The fraction of the positive values nearest zero and, separately, of the negative ones (the original SET code).

    >>> sign_split(torch.tensor([3.0, 1.0, -5.0, -2.0]), 0.5).sort().values
    tensor([1, 3])
    """
    sides = [(values > 0).nonzero()[:, 0], (values <= 0).nonzero()[:, 0]]
    return torch.cat([side[smallest(values[side], fraction)] for side in sides])
