"""Which places a sparse layer stores."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from noctule.core.topology import Topology, check_weights
from noctule.sparse.budget import check_said_once, weights_at

Pattern = Callable[[nn.Module, int, torch.Generator | None], Topology]
"""A dense layer and a number of weights -> the places that stay."""


def anywhere(layer: nn.Module, weights: int, generator: torch.Generator | None = None) -> Topology:
    """Random places, each equally likely, whatever the weights are."""
    weight_OI = _matrix(layer)
    return Topology.random(_shape(weight_OI), weights, generator=generator).to(weight_OI.device)


def largest(layer: nn.Module, weights: int, generator: torch.Generator | None = None) -> Topology:
    """The places of the largest |weight|."""
    return kept_places(_matrix(layer), None, weights, None)


def chosen_places(
    shape: tuple[int, int],
    density: float | None,
    weights: int | None,
    topology: Topology | None,
    *,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> tuple[Topology, torch.device | str]:
    """The places of a new layer of which one of the three is given, random ones or ``topology``, and the device of its parameters.

    Raises:
        ValueError: none or several are given, or they do not fit the shape.
    """
    check_said_once(density=density, weights=weights, topology=topology)
    if topology is not None:
        if topology.shape != shape:
            raise ValueError(f"the topology has shape {topology.shape}, the layer {shape} (out, in)")
        return topology, device or topology.device
    count = weights if density is None else weights_at(density, shape)
    return Topology.random(shape, count or 0, generator=generator), device or torch.get_default_device()


def kept_places(weight_OI: Tensor, density: float | None, weights: int | None, topology: Topology | None) -> Topology:
    """The places of a dense weight that stay: the largest, those of ``topology``, or (with nothing given) the non-zeros.

    Raises:
        ValueError: several are given, or they do not fit the shape.
    """
    shape, flat = _shape(weight_OI), weight_OI.flatten()
    if density is None and weights is None and topology is None:
        return Topology.from_keys(shape, flat.nonzero()[:, 0])
    check_said_once(density=density, weights=weights, topology=topology)
    if topology is not None:
        return topology
    count = weights_at(density, shape) if density is not None else weights or 0
    check_weights(count, shape)
    return Topology.from_keys(shape, flat.abs().topk(count).indices.sort().values)


def _matrix(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def _shape(weight_OI: Tensor) -> tuple[int, int]:
    return weight_OI.shape[0], weight_OI.shape[1]
