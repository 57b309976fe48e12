"""Aggregates: one tensor of several workers' tensors, by mean, median or a rule that is robust to faulty workers.

Shapes: W workers, n numbers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Aggregate = Callable[[Sequence[Sequence[Tensor]]], list[Tensor]]
"""(W lists of tensors of the same shapes) -> one such list."""


def mean(arrivals: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The mean, the only aggregate that can be computed from a sum."""
    return [_mean(*several) for several in zip(*arrivals, strict=True)]


def median(arrivals: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The median of each number; of an even number of workers the mean of the two in the middle."""
    return trimmed_mean((len(arrivals) - 1) // 2)(arrivals)


def trimmed_mean(trim: int) -> Aggregate:
    """The mean of each number without its ``trim`` largest and smallest (Yin et al. 2018, arXiv 1803.01498).

    >>> trimmed_mean(1)([[torch.tensor([x])] for x in (1.0, 2.0, 99.0)])
    [tensor([2.])]
    """
    if trim < 0:
        raise ValueError(f"trimmed_mean leaves out at least none, got {trim}")

    def trimmed(arrivals: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        workers = len(arrivals)
        if 2 * trim >= workers:
            raise ValueError(f"of {workers} workers {trim} largest and {trim} smallest leave none: trim fewer")
        ordered = (torch.stack(list(several)).sort(0).values for several in zip(*arrivals, strict=True))
        return [x[trim : workers - trim].mean(0) for x in ordered]  # NaN is the largest: more than `trim` of them show

    trimmed.__qualname__ = f"trimmed_mean({trim})"  # as it is compared in the handshake
    return trimmed


def krum(faulty: int) -> Aggregate:
    """All tensors of the worker whose nearest neighbours are the nearest (Blanchard et al. 2017, arXiv 1703.02757).

    Args:
        faulty: the number of workers that may send anything; at least ``2 * faulty + 3`` are needed.
    """
    if faulty < 0:
        raise ValueError(f"krum tolerates a number of faulty workers, got {faulty}")

    def nearest(arrivals: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        workers = len(arrivals)
        if workers < 2 * faulty + 3:
            raise ValueError(f"krum({faulty}) needs at least {2 * faulty + 3} workers, there are {workers}")
        rows = torch.stack([torch.cat([x.flatten().double() for x in each]) for each in arrivals])
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        distances = torch.where(distances.isfinite(), distances, torch.inf).fill_diagonal_(0.0)
        scores = distances.sort(1).values[:, 1 : workers - faulty - 1].sum(1)  # without itself and the farthest
        return [x.clone() for x in arrivals[int(scores.argmin())]]

    nearest.__qualname__ = f"krum({faulty})"
    return nearest


def _mean(first: Tensor, *others: Tensor) -> Tensor:
    """The mean without stacking first, which takes longer than the sum; 16 bits are added up in 32."""
    if torch.finfo(first.dtype).bits < 32:
        return torch.stack([first, *others]).mean(0)
    total = first + others[0] if others else first.clone()
    for x in others[1:]:
        total += x
    return total.div_(1 + len(others))
