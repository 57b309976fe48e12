"""Weights in 8, 4 or 1 bits; activations and arithmetic stay in floating point."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule.compress.quantize.fake import FakeQuantized
from noctule.compress.quantize.integer_layer import IntegerLayer
from noctule.compress.quantize.layers import Bits, Layer, bits_by_name, rule_for
from noctule.core.convert import Leave, Rule


class WeightOnlyLayer(IntegerLayer):
    """A layer that holds whole numbers and makes floats of them in each forward.

    It saves bytes, not time: the weight in floating point is there while it is used.
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if x.dtype is torch.float16:  # sums of codes could leave its range
            return self.finish(self.product(x, self.floats(x.dtype)))
        return self.finish(self.product(x, self.integers().to(x.dtype)), self.scales).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class WeightOnly:
    """`nn.Linear`, `nn.Conv2d`, `SparseLinear`, `SparseConv2d` -> the same with weights of few bits and a scale a row.

    A layer that learnt under `FakeQuantize` keeps the bits that it learnt with, where it has no quantised activations.

    Args:
        bits: 8, 4 or 1 for all layers, or a mapping from names of layers, as `choose_bits` gives; the others stay.

    >>> from noctule.core.convert import convert_
    >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> print(convert_(model, WeightOnly(bits=4)))
    changed 0: Linear -> WeightOnlyLayer(100 -> 50, bits=4)
    changed 2: Linear -> WeightOnlyLayer(50 -> 10, bits=4)
    >>> model.state_dict()["0.codes"].nbytes
    2500
    """

    bits: Bits = 8

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """Refuse weights that are not finite before any is replaced."""
        bits = bits_by_name(self.bits, modules)

        def make(name: str, module: Layer | FakeQuantized) -> nn.Module:
            if isinstance(module, FakeQuantized):
                if module.activations:
                    raise Leave("it learnt with quantised activations: convert it with StaticInt8()")
                return WeightOnlyLayer(module.layer, module.bits)
            if name not in bits:
                raise Leave("bits= does not name it")
            return WeightOnlyLayer(module, bits[name])

        return rule_for(modules, make, FakeQuantized)
