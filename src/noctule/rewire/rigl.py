"""RigL: grow where the gradient of the whole dense layer is steepest.

Evci, Gale, Menick, Castro, Elsen 2020, "Rigging the Lottery: Making All Tickets Winners", arXiv 1911.11134. Differs from the
authors' code: the dense gradient is never whole in memory. It is computed in tiles of rows on the steps where connections
move, and only the steepest places so far are kept.
"""

from typing import Any

import torch
from torch import Tensor

from noctule.layers import SparseLayer
from noctule.rewire.engine import Rewire
from noctule.schedule import cosine

TILE_PLACES = 1 << 22
"""Places of the dense gradient in memory at once (16 MiB in float32)."""


class _WholeGradient:
    def __init__(self, layer: SparseLayer) -> None:
        self.layer = layer
        self.passes: list[tuple[Tensor, Any]] = []

    def __call__(self, dy: Tensor, x: Any) -> None:
        self.passes.append((dy, x))

    def choose(self, count: int, taken: Tensor) -> Tensor:
        if not self.passes:
            return taken.new_empty(0)
        out_features, in_features = self.layer.topology.shape
        best, best_keys = self.layer.values.new_empty(0), taken.new_empty(0)
        step = max(1, TILE_PLACES // max(in_features, 1))
        for row in range(0, out_features, step):
            stop = min(row + step, out_features)
            tiles = (self.layer.gradient_rows(row, stop, dy, x) for dy, x in self.passes)
            gradient = sum(tiles, torch.zeros((), device=best.device)).abs().flatten()
            first = row * in_features
            here = taken[torch.searchsorted(taken, first) : torch.searchsorted(taken, first + gradient.numel())]
            gradient[here - first] = -1.0
            score, place = gradient.topk(min(count, gradient.numel() - here.numel()))
            best, best_keys = torch.cat([best, score]), torch.cat([best_keys, place + first])
            best, order = best.topk(min(count, best.numel()))
            best_keys = best_keys[order]
        return best_keys


def steepest(layer: SparseLayer, generator: torch.Generator) -> _WholeGradient:
    """A `Grow` that looks at the gradient of every missing place."""
    return _WholeGradient(layer)


def rigl(*, until: int, fraction: float = 0.3, **options: Any) -> Rewire:
    """`Rewire` with RigL's growth and its schedule: the fraction falls along a cosine to zero at step ``until``."""
    return Rewire(grow=steepest, fraction=cosine(fraction, end=0.0, steps=until), until=until, **options)
