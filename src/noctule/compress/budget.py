"""One choice for each layer under a budget that they share."""

from collections.abc import Sequence

import torch

UNITS = 4096
"""Parts of the budget that are told apart; a choice takes whole parts, rounded up."""


def least_harm(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """Which option of each layer to take, so that the sum of harms is least: a knapsack, solved by dynamic programming.

    Args:
        options: of each layer, (size, harm); of equal sums those that come first are taken.
        budget: what the sizes may add up to.

    Raises:
        ValueError: the smallest options do not fit.

    >>> least_harm([[(8, 0.0), (2, 1.0)], [(8, 0.0), (2, 3.0)]], 10)
    [1, 0]
    """
    unit = max(1, budget // UNITS)
    harms = torch.full((max(0, budget) // unit + 1,), torch.inf, dtype=torch.float64, device="cpu")
    harms[0], taken = 0.0, []
    for layer in options:
        wider, choice = torch.full_like(harms, torch.inf), torch.zeros_like(harms, dtype=torch.int64)
        for number, (size, harm) in enumerate(layer):
            if (units := -(-size // unit)) < len(harms):
                added = harms[: len(harms) - units] + harm
                choice[units:][added < wider[units:]] = number
                torch.minimum(wider[units:], added, out=wider[units:])
        harms = wider
        taken.append(choice)
    used = int(harms.argmin())
    if harms[used] == torch.inf:
        least = sum(min(size for size, _ in layer) for layer in options)
        raise ValueError(f"{budget:,} do not hold these layers: the smallest choices take {least:,} (and rounding)")
    result = []
    for layer, choice in zip(reversed(options), reversed(taken), strict=True):
        result.append(int(choice[used]))
        used -= -(-layer[result[-1]][0] // unit)
    return result[::-1]
