"""Weights in 8, 4 or 1 bits; activations and arithmetic stay in floating point."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from noctule.compress.quantize.bits import Bits, bits_for, check, check_names
from noctule.compress.quantize.fake import FakeQuantized
from noctule.compress.quantize.operation import Layer, bias_of, operation_of, rule_for, weight_of
from noctule.compress.quantize.stored import IntegerWeight
from noctule.core.convert import Leave, Rule


class WeightOnlyLayer(nn.Module):
    """A linear layer or a convolution, dense or sparse, that holds whole numbers and makes floats of them in each forward.

    It saves bytes, not time: the weight in floating point is there while it is used. It is not trained any further.
    """

    bias: Tensor | None

    def __init__(self, layer: Layer, bits: int) -> None:
        super().__init__()
        self.operation = operation_of(layer)
        weight, topology = weight_of(layer)
        self.stored = IntegerWeight(weight, bits, topology)
        self.register_buffer("bias", bias_of(layer))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), or images (B, C, H, W) -> (B, O, H', W')."""
        self.operation.check(x)
        y = self.operation.product(x, self.stored.floats(x.dtype), self.stored.places)
        return self.operation.finish(y, None, self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes mean, float32, made anew: for code that reads it, as torch's encoder layers do."""
        return self.stored.dense()

    @override
    def __repr__(self) -> str:
        return f"WeightOnlyLayer({self.operation}, bits={self.stored.bits})"


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
    >>> model.state_dict()["0.stored.codes"].nbytes
    2500
    """

    bits: Bits = 8

    def __post_init__(self) -> None:
        check(self.bits)

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """Refuse weights that are not finite before any is replaced."""
        check_names(self.bits, modules)

        def make(name: str, module: Layer | FakeQuantized) -> nn.Module:
            if isinstance(module, FakeQuantized):
                if module.activations:
                    raise Leave("it learnt with quantised activations: convert it with StaticInt8()")
                return WeightOnlyLayer(module.layer, module.bits)
            return WeightOnlyLayer(module, bits_for(self.bits, name))

        return rule_for(modules, make, (FakeQuantized,))
