"""What a layer does with its weight, whatever the weight is stored in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule.core.convert import Leave, Rule
from noctule.core.finite import all_finite
from noctule.core.topology import Topology
from noctule.kernels import Epilogue
from noctule.sparse.layers import SparseConv2d, SparseLayer, SparseLinear
from noctule.sparse.layers.convolution import Geometry, sparse_convolution
from noctule.sparse.layers.dense_twin import dense_convolution, dense_weight
from noctule.sparse.layers.product import sparse_product
from noctule.sparse.layers.staying import obstacle, quantised
from noctule.sparse.layers.surroundings import eager

Layer = nn.Linear | nn.Conv2d | SparseLinear | SparseConv2d
KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, SparseLinear, SparseConv2d)


@dataclass(frozen=True)
class Operation:
    """A linear layer (``geometry`` is None) or a convolution, and the activation that follows where it is fused."""

    shape: tuple[int, ...]
    """Of the dense weight: (O, I) or (O, C / G, KH, KW)."""
    geometry: Geometry | None = None
    slope: float = 1.0
    """Of the activation below zero; 1 is none, 0 is ReLU."""

    def product(self, x: Tensor, weight: Tensor, topology: Topology | None = None) -> Tensor:
        """x (..., I) or (B, C, H, W) times a weight of ``shape``, or times the values (N,) of a sparse one."""
        g = self.geometry
        if topology is not None:
            return self._sparse(x, weight, topology)
        if g is None:
            return F.linear(x, weight)
        (top, below), (left, right) = g.padding
        if (top, left) == (below, right):
            return F.conv2d(x, weight, None, g.stride, (top, left), g.dilation, g.groups)
        return F.conv2d(F.pad(x, (left, right, top, below)), weight, None, g.stride, 0, g.dilation, g.groups)

    def _sparse(self, x: Tensor, values: Tensor, topology: Topology) -> Tensor:
        g = self.geometry
        if not eager(x):
            if g is not None:
                return dense_convolution(x, values, None, topology, g)
            return F.linear(x, dense_weight(values, topology, self.shape))
        if g is None:
            y = sparse_product(x.reshape(-1, self.shape[1]), values, None, topology, Epilogue(), None)
            return y.reshape(*x.shape[:-1], self.shape[0])
        y = sparse_convolution(x if x.dim() == 4 else x[None], values, None, topology, g, Epilogue(), None)
        return y if x.dim() == 4 else y[0]

    def finish(self, product: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
        """The product times a scale (O,) a row, plus the bias (O,), through the activation."""
        row = (-1,) if self.geometry is None else (-1, 1, 1)
        y = product if scales is None else product * scales.view(row)
        y = y if bias is None else y + bias.view(row).to(y.dtype)
        return y if self.slope == 1.0 else F.leaky_relu(y, self.slope)

    def check(self, x: Tensor) -> None:
        """Refuse an input of other features or channels."""
        if self.geometry is None:
            if x.shape[-1:] != self.shape[1:]:
                raise ValueError(f"expected inputs of {self.shape[1]} features, got shape {tuple(x.shape)}")
        elif x.dim() not in (3, 4) or x.shape[-3] != self.geometry.in_channels:
            raise ValueError(f"expected images of {self.geometry.in_channels} channels, got shape {tuple(x.shape)}")

    def __str__(self) -> str:
        """Its widths, kernel and stride."""
        g, (into, out) = self.geometry, self.widths
        return f"{into} -> {out}" if g is None else f"{into} -> {out}, kernel_size={g.kernel_size}, stride={g.stride}"

    @property
    def widths(self) -> tuple[int, int]:
        """Features or channels in and out."""
        return (self.geometry.in_channels if self.geometry else self.shape[1]), self.shape[0]


def operation_of(layer: Layer) -> Operation:
    """What a layer does with its weight.

    Raises:
        Leave: it pads with something else than zeros.
    """
    if isinstance(layer, SparseLayer):
        if isinstance(layer, SparseConv2d):
            return Operation(layer.geometry.weight_shape, layer.geometry, layer.epilogue.slope)
        return Operation(layer.topology.shape, None, layer.epilogue.slope)
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise Leave(f"it pads with {layer.padding_mode!r}, not with zeros")
        left, right, top, below = layer._reversed_padding_repeated_twice
        sizes: Any = (layer.kernel_size, layer.stride, ((top, below), (left, right)), layer.dilation, layer.groups)
        return Operation(tuple(layer.weight.shape), Geometry(layer.in_channels, layer.out_channels, *sizes))
    return Operation(tuple(layer.weight.shape))


def weight_of(layer: Any) -> tuple[Tensor, Topology | None]:
    """The weight of a dense layer, or the values of a sparse one and where they lie."""
    return (layer.values, layer.topology) if isinstance(layer, SparseLayer) else (layer.weight, None)


def rule_for(
    modules: Mapping[str, nn.Module],
    make: Callable[[str, Any], nn.Module],
    wrappers: tuple[type[nn.Module], ...] = (),
) -> Rule:
    """The rule that has each layer replaced by what ``make`` gives for its name and itself.

    Args:
        modules: those the rule may look at.
        make: may raise `Leave`.
        wrappers: modules round a ``layer``, which are given to ``make`` as they are, in its place.

    Raises:
        ValueError: a weight is NaN or infinite; nothing was changed yet.
    """
    names = {module: name for name, module in modules.items()}
    inside = {module.layer for module in modules.values() if isinstance(module, wrappers)}
    for module, name in names.items():
        if type(module) in KINDS and not all_finite(weight_of(module)[0].detach()):
            raise ValueError(f"the weights of {name or 'the model'} are NaN or infinite: load a checkpoint from before")

    def rule(module: nn.Module) -> nn.Module | None:
        if reason := quantised(module):
            raise Leave(reason)
        if module in inside or not isinstance(module, (wrappers, KINDS)):
            return None
        if reason := obstacle(module):
            raise Leave(reason)
        if type(module) not in KINDS and not isinstance(module, wrappers):
            raise Leave(f"{type(module).__name__} is not one of {', '.join(kind.__name__ for kind in KINDS)}")
        if module not in names:
            raise Leave("it holds tied weights")
        return make(names[module], module)

    return rule


@torch.no_grad()
def bias_of(layer: Layer) -> Tensor | None:
    """A copy of the bias, float32."""
    return None if layer.bias is None else layer.bias.detach().to(torch.float32).clone()
