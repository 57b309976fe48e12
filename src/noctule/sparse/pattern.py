"""Which places of a dense layer a sparse one keeps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from noctule.core.topology import Topology

Pattern = Callable[[nn.Module, int, torch.Generator | None], Topology]
"""A dense layer and a number of weights -> the places that stay."""


def anywhere(layer: nn.Module, weights: int, generator: torch.Generator | None = None) -> Topology:
    """Random places, each equally likely, whatever the weights are."""
    weight_OI = _matrix(layer)
    return Topology.random(_shape(weight_OI), weights, generator=generator).to(weight_OI.device)


def largest(layer: nn.Module, weights: int, generator: torch.Generator | None = None) -> Topology:
    """The places of the largest |weight|."""
    weight_OI = _matrix(layer)
    return Topology.from_keys(_shape(weight_OI), weight_OI.flatten().abs().topk(weights).indices.sort().values)


def _matrix(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def _shape(weight_OI: Tensor) -> tuple[int, int]:
    return weight_OI.shape[0], weight_OI.shape[1]
