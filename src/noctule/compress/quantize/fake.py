"""Quantisation-aware training: weights and activations are rounded in each forward and learnt in floating point.

Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877. Differs from the paper: batch norms are folded before (`fold_batch_norms`),
not with the statistics of each batch. One bit: Courbariaux, Bengio, David 2015, BinaryConnect, arXiv 1511.00363, deterministic;
with the scale a row of XNOR-Net (arXiv 1603.05279), whose own derivative is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from noctule.compress.quantize.calibration import Ranges
from noctule.compress.quantize.layers import Bits, Layer, bits_by_name, check_width, rule_for, weight_of
from noctule.compress.quantize.numbers import Grid, dequantize_weight, grid, quantize_weight
from noctule.core.convert import Leave, Rule


class FakeQuantized(nn.Module):
    """A layer whose weight and input are rounded in each forward; both are learnt in floating point.

    In training the range of the inputs is a moving average of each batch's; the first batch sets it. Inputs out of range get no
    gradient. Weights of one bit are kept within -1 and 1.
    """

    range: Tensor
    batches: Tensor

    def __init__(self, layer: Layer, bits: int, how: "FakeQuantize", start: Sequence[float] | None) -> None:
        super().__init__()
        self.layer, self.bits, self.activations = layer, bits, how.activations
        self.activation_bits, self.momentum = how.activation_bits, how.momentum
        device = weight_of(layer)[0].device
        self.register_buffer("range", torch.tensor(start or (0.0, 0.0), dtype=torch.float32, device=device))
        self.register_buffer("batches", torch.tensor(int(start is not None), device=device))

    @property
    def grid(self) -> Grid:
        """What inputs are rounded to."""
        return grid(*self.range.tolist(), bits=self.activation_bits)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for rounded inputs and weights."""
        weight, topology = weight_of(self.layer)
        if self.bits == 1 and self.training:
            with torch.no_grad():
                weight.clamp_(-1.0, 1.0)
        if self.activations:
            x = self._rounded(x)
        rounded = dequantize_weight(*quantize_weight(weight, self.bits, topology), topology).to(weight.dtype)
        rounded = rounded + (weight - weight.detach())  # zero, through which the gradient goes to the weight
        return functional_call(self.layer, {"weight" if topology is None else "values": rounded}, (x,))

    def _rounded(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.range.lerp_(torch.stack(x.aminmax()).to(self.range.dtype), self.momentum if self.batches else 1.0)
                self.batches += 1
        elif not self.batches:
            raise ValueError("no batch was seen in training, so there is no range to round to: train, or give ranges=")
        into = self.grid
        return torch.fake_quantize_per_tensor_affine(x, into.scale, into.zero_point, 0, into.highest)

    @override
    def extra_repr(self) -> str:
        return f"bits={self.bits}" + (f", activation_bits={self.activation_bits}" if self.activations else "")


@dataclass(frozen=True, kw_only=True)
class FakeQuantize:
    """Layers -> the same with rounded weights and inputs, to train on (quantisation-aware training).

    Build the optimizer after it. What is trained becomes whole numbers by `StaticInt8()`, or with ``activations=False`` by
    `WeightOnly()`, and computes the same.

    Args:
        bits: of the weights, 8, 4 or 1, or a mapping from names of layers, as `choose_bits` gives; the others stay.
        activations: round the inputs too; with 8 bits only, which `StaticInt8` has.
        activation_bits: 8 or 7.
        ranges: where the moving averages start, from `calibrate`; else at the first batch.
        momentum: share of a new batch in them.
        narrowest: layers of fewer features in or out stay, as with `StaticInt8`, where activations are rounded.

    >>> from noctule.core.convert import convert_
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    >>> _ = convert_(model, FakeQuantize())
    >>> model(torch.randn(8, 64)).sum().backward()
    >>> model[0].layer.weight.grad.shape
    torch.Size([32, 64])
    """

    bits: Bits = 8
    activations: bool = True
    activation_bits: int = 8
    ranges: Ranges | None = None
    momentum: float = 0.01
    narrowest: int = 16

    def __post_init__(self) -> None:
        if self.activations and self.bits != 8:
            raise ValueError(
                f"rounded activations go with weights of 8 bits, got bits={self.bits}: set activations=False, so that WeightOnly "
                "can store what is learnt"
            )
        grid(0.0, 1.0, bits=self.activation_bits)
        if not 0.0 < self.momentum <= 1.0:
            raise ValueError(f"momentum must lie in (0, 1], got {self.momentum}")

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """Refuse weights that are not finite before any is replaced."""
        bits, ranges = bits_by_name(self.bits, modules), self.ranges or {}

        def make(name: str, layer: Layer | FakeQuantized) -> nn.Module:
            if isinstance(layer, FakeQuantized):
                raise Leave("it learns in few bits already")
            if name not in bits:
                raise Leave("bits= does not name it")
            if self.activations:
                check_width(layer, self.narrowest)
            return FakeQuantized(layer, bits[name], self, ranges.get(name))

        return rule_for(modules, make, FakeQuantized)
