"""Which places of a dense layer a sparse one keeps."""

from collections.abc import Callable

import torch
from torch import nn

from noctule.topology import Topology

Pattern = Callable[[nn.Linear, int, torch.Generator | None], Topology]
"""A dense layer and a number of weights -> the places that stay."""


def anywhere(linear: nn.Linear, weights: int, generator: torch.Generator | None = None) -> Topology:
    """Random places, each equally likely, whatever the weights are."""
    shape = (linear.out_features, linear.in_features)
    return Topology.random(shape, weights, generator=generator).to(linear.weight.device)


def largest(linear: nn.Linear, weights: int, generator: torch.Generator | None = None) -> Topology:
    """The places of the largest |weight|."""
    keys = linear.weight.detach().abs().flatten().topk(weights).indices.sort().values
    return Topology.from_keys((linear.out_features, linear.in_features), keys)
