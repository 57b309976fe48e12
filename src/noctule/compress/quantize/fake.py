"""Quantisation in floating point, so that a network learns with the weights and activations that it will have.

Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877. Differs from the paper: batch norms are folded before (`fold_batch_norms`),
not with the statistics of each batch. One bit: Courbariaux, Bengio, David 2015, BinaryConnect, arXiv 1511.00363, deterministic;
with the scale a row of XNOR-Net (arXiv 1603.05279), whose own derivative is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from noctule.compress.quantize.bits import Bits, bits_for, check, check_names
from noctule.compress.quantize.calibration import Ranges
from noctule.compress.quantize.numbers import Grid, dequantize_weight, grid, quantize_weight
from noctule.compress.quantize.operation import Layer, operation_of, rule_for, weight_of
from noctule.core.convert import Leave, Rule
from noctule.core.topology import Topology


class StraightThrough(torch.autograd.Function):
    """What the codes of a weight mean; its gradient goes to the weight unchanged."""

    @staticmethod
    @override
    def forward(ctx: Any, weight: Tensor, bits: int, topology: Topology | None) -> Tensor:
        return dequantize_weight(*quantize_weight(weight, bits, topology), topology).to(weight.dtype)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


class FakeQuantized(nn.Module):
    """A layer whose weight and input are rounded in each forward; both are learnt in floating point.

    In training the ranges of input and output are moving averages of each batch's; the first batch sets them. Out of range
    inputs get no gradient. Weights of one bit are kept within -1 and 1.
    """

    ranges: Tensor
    batches: Tensor

    def __init__(self, layer: Layer, bits: int, *, activations: bool, activation_bits: int, momentum: float) -> None:
        super().__init__()
        self.layer, self.bits, self.activations = layer, bits, activations
        self.activation_bits, self.momentum = activation_bits, momentum
        self.register_buffer("ranges", torch.zeros(2, 2))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Of the input and of the output."""
        into, out = (grid(low, high, bits=self.activation_bits) for low, high in self.ranges.tolist())
        return into, out

    @override
    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of rounded inputs with rounded weights."""
        weight, topology = weight_of(self.layer)
        if self.bits == 1 and self.training:
            with torch.no_grad():
                weight.clamp_(-1.0, 1.0)
        if self.activations:
            x = self._rounded(x)
        name = "weight" if topology is None else "values"
        rounded: Any = StraightThrough.apply(weight, self.bits, topology)
        y = functional_call(self.layer, {name: rounded}, (x,))
        if self.activations and self.training:
            self._see(1, y)
            self.batches += 1
        return y

    def _rounded(self, x: Tensor) -> Tensor:
        if self.training:
            self._see(0, x)
        elif not self.batches:
            raise ValueError(
                "no batch was seen in training, so there is no range to round to: train first, or give ranges="
            )
        g = self.grids[0]
        return torch.fake_quantize_per_tensor_affine(x, g.scale, g.zero_point, g.lowest, g.highest)

    @torch.no_grad()
    def _see(self, which: int, x: Tensor) -> None:
        now = torch.stack(x.detach().aminmax()).float()
        share = self.momentum if self.batches else 1.0
        self.ranges[which].lerp_(now, share)

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
        check(self.bits)
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
        check_names(self.bits, modules)

        def make(name: str, layer: Layer) -> nn.Module:
            bits, operation = bits_for(self.bits, name), operation_of(layer)
            if self.activations:
                check_width(operation.widths, self.narrowest)
            new = FakeQuantized(
                layer,
                bits,
                activations=self.activations,
                activation_bits=self.activation_bits,
                momentum=self.momentum,
            ).to(weight_of(layer)[0].device)
            if self.ranges is not None and name in self.ranges:
                new.ranges.copy_(torch.tensor(self.ranges[name]))
                new.batches.fill_(1)
            return new

        return rule_for(modules, make)


def check_width(widths: tuple[int, int], narrowest: int) -> None:
    """Raise `Leave` for a layer that is too narrow to gain from int8."""
    if min(widths) < narrowest:
        raise Leave(
            f"{widths[0]} -> {widths[1]} is narrower than {narrowest}: int8 products gain no time there. WeightOnly(bits=8) saves "
            "its bytes; narrowest= includes it"
        )
