"""Guided stochastic exploration: grow where the gradient is steepest among randomly drawn candidates.

Heddes, Srinivasa, Givargis, Nicolau 2024, "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration",
arXiv 2401.06898: as many candidates as there are weights (gamma = 1), drawn uniformly; time and memory O(N).
"""

from typing import Any

import torch
from torch import Tensor

from noctule.core.topology import Topology
from noctule.sparse.layers import SparseLayer
from noctule.sparse.rewire.engine import Rewire, SharedCapture


class _Candidates(SharedCapture):
    def __init__(self, layer: SparseLayer, generator: torch.Generator) -> None:
        self.layer, topology = layer, layer.topology
        self.keys = topology.missing(topology.size, generator=generator)
        self.candidates = Topology.from_keys(topology.shape, self.keys).to(topology.device)
        self.gradient: Tensor | None = None

    def __call__(self, dy: Tensor, x: Any) -> None:
        gradient = self.layer.gradient_at(self.candidates, dy, x)
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def choose(self, count: int, taken: Tensor, dropped: Tensor) -> Tensor:
        if not self.any_worker(self.gradient is not None):
            return taken.new_empty(0)
        gradient = self.layer.values.new_zeros(self.keys.numel())
        if self.gradient is not None:
            gradient += self.gradient
        steepest = self.mean(gradient).abs().topk(min(count, self.keys.numel()), sorted=False).indices
        return self.keys.to(steepest.device)[steepest]


def guided(layer: SparseLayer, generator: torch.Generator) -> _Candidates:
    """A `Grow` that adds up the gradient at as many random missing places as the layer has weights."""
    return _Candidates(layer, generator)


def gse(**options: Any) -> Rewire:
    """`Rewire` with guided growth: the default."""
    return Rewire(grow=guided, **options)
