"""Sorted lists of numbers that stand for places, on the CPU in a fifth of the time of torch's own search.

Shapes: N sorted keys, K sorted ones that are looked for among them; int64, below 2**62.
"""

import numpy as np
import torch
from torch import Tensor

SHUFFLED = 1 << 10
"""Up to so many places are shuffled all together; among more, the few are drawn one by one."""
_MERGED = 1 << 22
"""Longer lists are searched: merged they would take their memory twice."""


def in_order(keys: Tensor) -> Tensor:
    """Numbers in order: numpy takes a tenth of the time of torch, which makes the order of the places too."""
    return torch.from_numpy(np.sort(keys.numpy())) if keys.is_cpu else keys.sort().values


def merged(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Both sorted lists as one (N + K,), and where in it the others are (K,): each behind all keys that are not larger.

    >>> merged(torch.tensor([2, 5]), torch.tensor([1, 5]))
    (tensor([1, 2, 5, 5]), tensor([0, 3]))
    """
    if _searched(keys, others):
        at = counts_up_to(keys, others) + torch.arange(others.numel(), device=keys.device)
        old = torch.ones(keys.numel() + others.numel(), dtype=torch.bool, device=keys.device)
        old[at] = False
        both = keys.new_empty(old.numel()).masked_scatter_(old, keys)
        both[at] = others
        return both, at
    both = torch.cat([keys << 1, (others << 1) | 1])
    both.numpy().sort(kind="stable")  # two runs in order: it merges them
    return both >> 1, torch.from_numpy(np.flatnonzero((both.numpy() & 1).astype(bool)))


def counts_up_to(keys: Tensor, wanted: Tensor) -> Tensor:
    """For each wanted key (K,) how many of the others (N,) are not larger; both are sorted.

    >>> counts_up_to(torch.tensor([2, 5, 5]), torch.tensor([1, 5, 6])).tolist()
    [0, 3, 3]
    """
    if _searched(keys, wanted):
        return torch.searchsorted(keys, wanted, right=True)
    return merged(keys, wanted)[1] - torch.arange(wanted.numel(), device="cpu")


def slots_of(keys: Tensor, wanted: Tensor) -> Tensor:
    """For each wanted key (K,) its position among the others (N,), each of which is there once, or -1; both are sorted.

    >>> slots_of(torch.tensor([2, 5]), torch.tensor([1, 5])).tolist()
    [-1, 1]
    """
    if not keys.numel():
        return torch.full_like(wanted, -1)
    slot = counts_up_to(keys, wanted) - 1
    return torch.where(keys[slot] == wanted, slot, -1)  # -1 is the last key: larger than one below all


def distinct(count: int, places: int, generator: torch.Generator | None) -> Tensor:
    """Sorted ``count`` distinct numbers below ``places``, each set equally likely, in O(count)."""
    if places <= SHUFFLED:
        return in_order(torch.randperm(places, generator=generator, device="cpu")[:count])
    if count > places // 2:
        return without(torch.arange(places, device="cpu"), places - count, generator)
    keys = torch.empty(0, dtype=torch.int64, device="cpu")
    while keys.numel() < count:
        short = count - keys.numel()
        more = short + round(short * count / places * 1.5) + 16  # about as many as will be drawn twice, and some
        keys = torch.cat([keys, torch.randint(places, (more,), generator=generator, device="cpu")])
        keys = in_order(keys).unique_consecutive()
    return without(keys, keys.numel() - count, generator)


def without(keys: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Without ``count`` of them, each set equally likely."""
    if not count:
        return keys
    keep = torch.ones(keys.numel(), dtype=torch.bool, device="cpu")
    keep[distinct(count, keys.numel(), generator)] = False
    return keys[keep]


def _searched(keys: Tensor, wanted: Tensor) -> bool:
    """Whether each is to be looked for by itself."""
    return not keys.is_cpu or not wanted.is_cpu or keys.numel() + wanted.numel() > _MERGED
