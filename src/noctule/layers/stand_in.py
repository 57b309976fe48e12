"""What other people's code finds where it reads the ``weight`` of a layer that has become sparse."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class StandIn(Tensor):
    """Shape, dtype and device of the dense weight, and its product with an input, but no numbers.

    Code that asks a weight for its dtype before it calls the layer, or hands it to ``F.linear``, works as before. Torch takes any
    tensor with a behaviour of its own out of its fused paths, such as that of ``nn.TransformerEncoderLayer`` in evaluation, which
    read weights past the layer's forward. Whoever needs the numbers is told what to do instead.

    Args:
        like: where dtype, device, whether it is trained and what others have noted on it come from.
        shape: of the dense weight.
        product: (x, bias) -> ``F.linear(x, weight, bias)``, or None where there is none.
    """

    product: Any

    @staticmethod
    def __new__(cls, like: Tensor, shape: tuple[int, ...], product: Any = None) -> "StandIn":
        """A tensor without a storage."""
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        made.__dict__.update(like.__dict__, product=product)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Its product, and whatever needs no numbers."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, StandIn) and weight.product is not None:
                return weight.product(x, bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing else."""
        raise RuntimeError(
            f"{func} reads the weight of a sparse layer, which holds its non-zeros only: use layer.values and layer.topology, "
            "or layer.to_dense().weight; or leave this layer dense: convert_(model, rule, where=lambda name, module: ...)"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"StandIn({tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias
