"""Smaller layers in the place of one: what low rank and separable convolutions make of a layer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule.core.convert import Leave, hooked


class Factored(nn.Sequential):
    """Layers that do one after the other, with fewer numbers, about what one layer did.

    Args:
        layers: by name, in order; the last one has the bias.
        about: what it was and what it is, in words.
        product: the layers' weights -> the weight of the one layer that they are together.
        lost: share of the squares of the replaced weight that the product does not have.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], *, about: str, product: Callable[..., Tensor], lost: float
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.about, self.product, self.lost = about, product, lost

    @property
    def weight(self) -> Tensor:
        """The weight of one layer in the place of all, computed: for modules that read that of their parts."""
        return self.product(*(layer.weight for layer in self))

    @property
    def bias(self) -> Tensor | None:
        """That of the last layer."""
        last: Any = self[-1]
        return last.bias

    @override
    def _get_name(self) -> str:
        return f"Factored({self.about}, lost={self.lost:.2%})"


def check_plain(module: nn.Module, *kinds: type[nn.Module], replaced: bool = True) -> bool:
    """Whether a module is of one of the kinds.

    Args:
        module: any.
        kinds: classes, whose subclasses may do anything with their weights.
        replaced: whether another module is to take its place, which hooks and groups prevent.

    Raises:
        Leave: it is of a kind, and has to stay as it is; the text says why.
    """
    if not isinstance(module, kinds):
        return False
    if type(module) not in kinds:
        raise Leave(f"{type(module).__name__} is not a plain {' or '.join(kind.__name__ for kind in kinds)}")
    if replaced and hooked(module):
        raise Leave("it has hooks, which would be lost")
    weight: Any = module.weight
    if replaced and isinstance(module, nn.Conv2d) and module.groups > 1:
        raise Leave(f"its {module.groups} groups have kernels of their own")
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        raise Leave(
            f"its weight, {weight.dtype} on {weight.device} of shape {tuple(weight.shape)}, has no numbers to factor"
        )
    if not bool(weight.isfinite().all()):
        raise Leave("its weight is not finite")
    return True


def linear_like(layer: nn.Linear, weight: Tensor, *, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer of these numbers, in the dtype, place and mode of another."""
    return _filled(nn.Linear(*weight.shape[::-1], bias=bias is not None, **_place(layer)), layer, weight, bias)


def conv_like(layer: nn.Conv2d, weight: Tensor, *, bias: Tensor | None = None, **options: Any) -> nn.Conv2d:
    """A convolution of these numbers, in the dtype, place and mode of another."""
    out_channels, channels = weight.shape[0], weight.shape[1] * options.get("groups", 1)
    size = (weight.shape[2], weight.shape[3])
    new = nn.Conv2d(channels, out_channels, size, bias=bias is not None, **options, **_place(layer))
    return _filled(new, layer, weight, bias)


def steps_of(layer: nn.Conv2d) -> dict[str, Any]:
    """How a convolution goes over the image."""
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}


def lost_share(before: Tensor, after: Tensor) -> float:
    """Share of the squares of a weight that another one does not have."""
    whole = float(before.detach().double().square().sum())
    return float((before.detach().double() - after.detach().double()).square().sum()) / whole if whole else 0.0


def _place(layer: nn.Module) -> dict[str, Any]:
    weight: Any = layer.weight
    return {"device": weight.device, "dtype": weight.dtype}


def _filled(new: Any, old: Any, weight: Tensor, bias: Tensor | None) -> Any:
    with torch.no_grad():
        new.weight.copy_(weight).requires_grad_(old.weight.requires_grad)
        if bias is not None:
            new.bias.copy_(bias).requires_grad_(old.bias.requires_grad)
    return new.train(old.training)
