"""Which connections stay, given the score of each and a density.

A pattern is a function of all layers together, so that a global threshold is one too. It sees the connections that are there and
never brings one back.

Shapes: O rows and I columns of a weight as a matrix (a convolution's columns are C KH KW), N connections of a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from noctule.sparse.budget import Budget, check_density, uniform, weights_at


class Candidates(NamedTuple):
    """The connections of one layer."""

    shape: tuple[int, ...]
    """Of the dense weight, (O, I) or (O, C, KH, KW)."""
    keys: Tensor
    """``row * I + column`` of each (N,), sorted."""
    scores: Tensor
    """(N,), finite."""

    @property
    def columns(self) -> int:
        """I."""
        return prod(self.shape[1:])

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each (N,)."""
        width = max(self.columns, 1)
        return self.keys // width, self.keys % width


Pattern = Callable[[Sequence[Candidates], float], list[Tensor]]
"""The layers and the density that is wanted -> for each layer which of its connections stay, a mask (N,)."""


@dataclass(frozen=True, kw_only=True)
class PerLayer:
    """The best connections of each layer, wherever they are.

    Args:
        budget: how the layers share the weights: ``uniform`` is the same density in all.
    """

    budget: Budget = uniform

    def __call__(self, layers: Sequence[Candidates], density: float) -> list[Tensor]:
        """Keep the share of each layer."""
        shapes = [layer.shape for layer in layers]
        places = [prod(shape) for shape in shapes]
        total = max(sum(p > 0 for p in places), round(density * sum(places)))
        return [_best(layer.scores, n) for layer, n in zip(layers, self.budget(shapes, total), strict=True)]


@dataclass(frozen=True)
class Globally:
    """The best connections of all layers together, by one threshold; each layer keeps its best one."""

    def __call__(self, layers: Sequence[Candidates], density: float) -> list[Tensor]:
        """Keep as many as the density of all places together says."""
        scores = [layer.scores.double().clone() for layer in layers]
        for own in scores:
            if own.numel():
                own[own.argmax()] = torch.inf
        total = round(density * sum(prod(layer.shape) for layer in layers))
        least = sum(own.numel() > 0 for own in scores)
        return list(_best(torch.cat(scores), max(total, least)).split([own.numel() for own in scores]))


@dataclass(frozen=True)
class Rows:
    """Pattern that keeps the rows (neurons, channels) of each weight with the largest sums of scores; the layer keeps its width.

    To remove neurons for good use `shrink` or `ImportancePruning`.
    """

    def __call__(self, layers: Sequence[Candidates], density: float) -> list[Tensor]:
        """Keep this share of each layer's rows."""
        return [_best_groups(x.places[0], x.scores, x.shape[0], weights_at(density, x.shape[:1])) for x in layers]


@dataclass(frozen=True)
class NM:
    """At most N of every M neighbouring columns of a row (2 of 4 unless said otherwise).

    While the density falls, k of M stay, where k / M is the density rounded; N of M once it is below.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"N:M keeps n of m neighbours with 1 <= n <= m, got n={self.n} and m={self.m}")

    def __call__(self, layers: Sequence[Candidates], density: float) -> list[Tensor]:
        """Keep the best of each group."""
        k = max(self.n, round(density * self.m))
        stays = []
        for x in layers:
            row, column = x.places
            groups = row * -(-x.columns // self.m) + column // self.m
            order = x.scores.argsort(descending=True, stable=True)
            order = order[groups[order].argsort(stable=True)]  # by group, within it by score
            sorted_groups = groups[order]
            rank = torch.arange(order.numel(), device=order.device) - torch.searchsorted(sorted_groups, sorted_groups)
            stays.append(torch.empty_like(groups, dtype=torch.bool).index_copy_(0, order, rank < k))
        return stays


@dataclass(frozen=True)
class Blocks:
    """Pattern that keeps the blocks of each weight matrix with the largest sums of scores; blocks at the edges may be smaller."""

    height: int = 4
    width: int = 1

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a block is at least 1 x 1, got {self.height} x {self.width}")

    def __call__(self, layers: Sequence[Candidates], density: float) -> list[Tensor]:
        """Keep this share of each layer's blocks."""
        stays = []
        for x in layers:
            row, column = x.places
            grid = (-(-x.shape[0] // self.height), -(-x.columns // self.width))
            blocks = row // self.height * grid[1] + column // self.width
            stays.append(_best_groups(blocks, x.scores, prod(grid), weights_at(density, grid)))
        return stays


def checked(density: float, step: int) -> float:
    """The density that a schedule gave.

    Raises:
        ValueError: it is no share of the places.
    """
    try:
        check_density(density)
    except ValueError as error:
        raise ValueError(f"the schedule at step {step}: {error}") from None
    return density


def _best(scores: Tensor, count: int) -> Tensor:
    """A mask of so many, the largest; of equals the first."""
    stays = torch.zeros_like(scores, dtype=torch.bool)
    stays[scores.argsort(descending=True, stable=True)[:count]] = True
    return stays


def _best_groups(groups: Tensor, scores: Tensor, many: int, count: int) -> Tensor:
    """A mask of all that belong to the ``count`` groups with the largest sums; of these are only those that hold something."""
    sums = scores.new_zeros(many, dtype=torch.float64).index_add_(0, groups, scores.double())
    sums[groups.bincount(minlength=many) == 0] = -torch.inf
    return _best(sums, count)[groups]
