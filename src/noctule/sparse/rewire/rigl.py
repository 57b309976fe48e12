"""RigL: grow where the gradient of the whole dense layer is steepest.

Evci, Gale, Menick, Castro, Elsen 2020, "Rigging the Lottery: Making All Tickets Winners", arXiv 1911.11134. Differs from the
authors' code: the dense gradient is never whole in memory. It is computed in tiles of rows on the steps where connections
move, and only the steepest places so far are kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noctule.core.schedule import cosine
from noctule.sparse.layers import SparseLayer
from noctule.sparse.rewire.engine import Rewire, SharedCapture

TILE_PLACES = 1 << 22
"""Places of the dense gradient in memory at once (16 MiB in float32)."""


def largest(
    scores: Callable[[int, int], Tensor], shape: tuple[int, int], count: int, excluded: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and scores of the ``count`` places with the largest scores, in tiles of rows.

    Args:
        scores: the scores, at least 0, of the rows from a first one to a last one (excluded).
        shape: of the weight, (O, I).
        count: how many places; fewer where fewer are left.
        excluded: sorted keys of places that are not to be had.
    """
    out_features, in_features = shape
    best, best_keys = torch.empty(0, device=excluded.device), excluded.new_empty(0)
    step = max(1, TILE_PLACES // max(in_features, 1))
    for row in range(0, out_features, step):
        tile, first = scores(row, min(row + step, out_features)).flatten(), row * in_features
        here = excluded[torch.searchsorted(excluded, first) : torch.searchsorted(excluded, first + tile.numel())]
        tile[here - first] = -1.0
        score, place = tile.topk(min(count, tile.numel() - here.numel()))
        best, best_keys = torch.cat([best, score]), torch.cat([best_keys, place + first])
        best, order = best.topk(min(count, best.numel()))
        best_keys = best_keys[order]
    return best_keys, best


class _WholeGradient(SharedCapture):
    def __init__(self, layer: SparseLayer) -> None:
        self.layer = layer
        self.passes: list[tuple[Tensor, Any]] = []

    def __call__(self, dy: Tensor, x: Any) -> None:
        self.passes.append((dy, x))

    def choose(self, count: int, taken: Tensor, dropped: Tensor) -> Tensor:
        if not self.any_worker(bool(self.passes)):
            return taken.new_empty(0)

        def steepness(start: int, stop: int) -> Tensor:
            nothing = self.layer.values.new_zeros(stop - start, self.layer.topology.shape[1])
            tiles = (self.layer.gradient_rows(start, stop, dy, x) for dy, x in self.passes)
            return self.mean(sum(tiles, nothing)).abs()

        return largest(steepness, self.layer.topology.shape, count, taken)[0]


def steepest(layer: SparseLayer, generator: torch.Generator) -> _WholeGradient:
    """A `Grow` that looks at the gradient of every missing place."""
    return _WholeGradient(layer)


def rigl(*, until: int, fraction: float = 0.3, **options: Any) -> Rewire:
    """`Rewire` with RigL's growth and its schedule: the fraction falls along a cosine to zero at step ``until``."""
    return Rewire(grow=steepest, fraction=cosine(fraction, end=0.0, steps=until), until=until, **options)
