"""Which connections go."""

from collections.abc import Callable

import torch
from torch import Tensor

Drop = Callable[[Tensor, float], Tensor]
"""Values (N,) and the fraction to drop -> the slots that go, int64, each once, in any order."""


def smallest(values: Tensor, fraction: float) -> Tensor:
    """The fraction with the smallest |value|.

    >>> smallest(torch.tensor([3.0, -1.0, 0.5, -2.0]), 0.5).sort().values
    tensor([1, 2])
    """
    return values.abs().topk(int(fraction * values.numel()), largest=False, sorted=False).indices


def sign_split(values: Tensor, fraction: float) -> Tensor:
    """The fraction of the positive values nearest zero and, separately, of the negative ones (the original SET code).

    >>> sign_split(torch.tensor([3.0, 1.0, -5.0, -2.0]), 0.5).sort().values
    tensor([1, 3])
    """
    sides = [(values > 0).nonzero()[:, 0], (values <= 0).nonzero()[:, 0]]
    return torch.cat([side[smallest(values[side], fraction)] for side in sides])
