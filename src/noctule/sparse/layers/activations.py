"""Activations that torch does not have."""

import torch
from torch import Tensor, nn
from typing_extensions import override


class AllReLU(nn.Module):
    """``x`` where positive, ``slope * x`` elsewhere, the sign of the slope alternating with the depth of the layer.

    Curci, Mocanu, Pechenizkiy 2021, arXiv 2102.01732: hidden layers 1, 3, 5... have -slope, hidden layers 2, 4, 6... +slope.
    Differs from the authors' code: the derivative at exactly 0 is that of the negative side, as in torch's LeakyReLU.

    Args:
        slope: of the negative side, before its sign.
        layer: which hidden layer this is, from 1.

    >>> AllReLU(0.6, layer=1)(torch.tensor([-1.0, 2.0])), AllReLU(0.6, layer=2)(torch.tensor([-1.0, 2.0]))
    (tensor([0.6000, 2.0000]), tensor([-0.6000,  2.0000]))
    """

    def __init__(self, slope: float, *, layer: int) -> None:
        super().__init__()
        if layer < 1:
            raise ValueError(f"hidden layers are counted from 1, got {layer}")
        self.negative_slope = -slope if layer % 2 else slope

    @override
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(x, self.negative_slope)

    @override
    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope:g}"
