"""A layer replaced by a product of smaller ones: what low rank and separable convolutions have in common."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule.core.convert import Leave, hooked


class Factored(nn.Sequential):
    """A chain of smaller layers that approximates one layer.

    Args:
        layer: what it takes the place of, whose dtype, device, mode and ``requires_grad`` it has.
        parts: name -> weight and, of a convolution, how it goes over the image; the last part gets the bias.
        about: what it was and what it is, in words.
        product: the weights of the parts -> the weight of the one layer that they are together.
    """

    lost: float
    """Share of the squares of the layer's weight that the product did not have at the start."""

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        parts: Mapping[str, tuple[Tensor, dict[str, Any]]],
        *,
        about: str,
        product: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        for name, (weight, options) in parts.items():
            bias = layer.bias if name == [*parts][-1] else None
            self.add_module(name, _made(layer, weight, bias, **options))
        whole = layer.weight.detach().double().square().sum()
        self.about, self.product = f"{layer.weight.shape[1]}, {layer.weight.shape[0]}, {about}", product
        missing = (layer.weight - self.weight).detach().double().square().sum()
        self.lost = float(missing / whole) if whole > 0.0 else 0.0
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight of one layer in the place of all, computed: for modules that read that of their parts."""
        return self.product(*(part.weight for part in self))

    @property
    def bias(self) -> Tensor | None:
        """That of the last part."""
        last: Any = self[-1]
        return last.bias

    @override
    def _get_name(self) -> str:
        return f"Factored({self.about}, lost={self.lost:.2%})"


def _made(layer: Any, weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Module:
    """A linear layer, or a convolution, of these numbers."""
    more: dict[str, Any] = {"bias": bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    out, into, *kernel = weight.shape
    if kernel:
        new: Any = nn.Conv2d(into * options.get("groups", 1), out, (kernel[0], kernel[1]), **options, **more)
    else:
        new = nn.Linear(into, out, **more)
    with torch.no_grad():
        new.weight.copy_(weight).requires_grad_(layer.weight.requires_grad)
        if bias is not None:
            new.bias.copy_(bias).requires_grad_(bias.requires_grad)
    return new


def check_plain(module: nn.Module, *kinds: type[nn.Module], replaced: bool = True) -> bool:
    """Whether a module is of one of these classes; `Leave` where it is and has to stay as it is, such as a subclass.

    Hooks and groups prevent only that another module is to take its place (``replaced``).
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


def check_ranks(layer: nn.Linear | nn.Conv2d, *ranks: tuple[int, int]) -> None:
    """Refuse ranks above the highest, given with each, and convolutions with groups."""
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise ValueError(f"a convolution with groups cannot be factored, this one has {layer.groups}")
    for rank, most in ranks:
        if not 1 <= rank <= most:
            raise ValueError(f"a rank must lie from 1 to {most}, got {rank}")


def steps_of(layer: Any) -> dict[str, Any]:
    """How a convolution goes over the image; nothing for a linear layer."""
    names = ("stride", "padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in names} if isinstance(layer, nn.Conv2d) else {}
