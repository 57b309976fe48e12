"""RigL: grow where the gradient of the whole dense layer is steepest.

Evci, Gale, Menick, Castro, Elsen 2020, "Rigging the Lottery: Making All Tickets Winners", arXiv 1911.11134. Differs from the
authors' code: the dense gradient is never whole in memory. It is computed in tiles of rows on the steps where connections
move, and only the steepest places so far are kept.
"""

from typing import Any

import torch
from torch import Tensor

from noctule.layers import SparseLinear
from noctule.rewire.engine import Rewire
from noctule.schedule import cosine
from noctule.topology import Topology

TILE_PLACES = 1 << 22
"""Places of the dense gradient in memory at once (16 MiB in float32)."""


class _WholeGradient:
    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.passes: list[tuple[Tensor, Tensor]] = []

    def __call__(self, dy_OB: Tensor, x_IB: Tensor) -> None:
        self.passes.append((dy_OB, x_IB))

    def choose(self, count: int, taken: Tensor) -> Tensor:
        if not self.passes:
            return taken.new_empty(0)
        dy_OB = torch.cat([dy for dy, _ in self.passes], 1)
        x_IB = torch.cat([x for _, x in self.passes], 1)
        out_features, in_features = self.topology.shape
        best, best_keys = dy_OB.new_empty(0), taken.new_empty(0)
        step = max(1, TILE_PLACES // max(in_features, 1))
        for row in range(0, out_features, step):
            gradient = (dy_OB[row : row + step] @ x_IB.t()).abs_().flatten()
            first = row * in_features
            here = taken[torch.searchsorted(taken, first) : torch.searchsorted(taken, first + gradient.numel())]
            gradient[here - first] = -1.0
            score, place = gradient.topk(min(count, gradient.numel() - here.numel()))
            best, best_keys = torch.cat([best, score]), torch.cat([best_keys, place + first])
            best, order = best.topk(min(count, best.numel()))
            best_keys = best_keys[order]
        return best_keys


def steepest(layer: SparseLinear, generator: torch.Generator) -> _WholeGradient:
    """A `Grow` that looks at the gradient of every missing place."""
    return _WholeGradient(layer.topology)


def rigl(*, until: int, fraction: float = 0.3, **options: Any) -> Rewire:
    """`Rewire` with RigL's growth and its schedule: the fraction falls along a cosine to zero at step ``until``."""
    return Rewire(grow=steepest, fraction=cosine(fraction, end=0.0, steps=until), until=until, **options)
