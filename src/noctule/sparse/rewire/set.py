"""Sparse evolutionary training: new connections anywhere.

Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", arXiv 1707.04780. Differs from the authors' code: new connections start at zero, so that growing them leaves the
function as it is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noctule.core.topology import Topology
from noctule.sparse.layers import SparseLayer
from noctule.sparse.rewire.engine import Rewire


@dataclass(frozen=True)
class _Blind:
    topology: Topology
    generator: torch.Generator

    def choose(self, count: int, taken: Tensor, dropped: Tensor) -> Tensor:
        return self.topology.missing(count, generator=self.generator)


def anywhere(layer: SparseLayer, generator: torch.Generator) -> _Blind:
    """A `Grow` that draws missing places uniformly, without looking."""
    return _Blind(layer.topology, generator)


def set_(**options: Any) -> Rewire:
    """`Rewire` with random growth: SET (the name ``set`` is Python's own)."""
    return Rewire(grow=anywhere, **options)
