"""Linear layers and convolutions in integer arithmetic, with ranges of activations that were observed before.

Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko 2018, arXiv 1712.05877. Differs from the paper: weights are symmetric
with a scale a row (Krishnamoorthi 2018, arXiv 1806.08342), the bias is float32, and each layer returns floats, which the next one
rounds: activations and sums between layers keep their precision.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule.compress.quantize.calibration import Ranges
from noctule.compress.quantize.fake import FakeQuantized, check_width
from noctule.compress.quantize.numbers import Grid, grid, quantize
from noctule.compress.quantize.operation import Layer, bias_of, operation_of, rule_for, weight_of
from noctule.compress.quantize.stored import IntegerWeight
from noctule.core.convert import Leave, Rule
from noctule.sparse.layers.surroundings import eager

EXACT_SUM = 2**24
"""Integers up to this are exact in float32, so sums of products of codes below it are exact too."""

_onednn: Any = torch.ops.onednn


class Int8Layer(nn.Module):
    """A linear layer or a convolution, dense or sparse, of int8 weights and uint8 inputs, whose products and sums are exact.

    Dense products are oneDNN's where that is exact: on processors with VNNI, and with inputs of 7 bits on all x86 processors
    (without VNNI it adds pairs of products in 16 bits, which saturate with 8). It keeps a packed copy of the weight, as large as
    the weight itself, from the first forward on. Elsewhere, and for sparse layers, the integers are multiplied as floats wide
    enough for the sums to be exact.

    Its buffers are what an integer runtime needs: ``stored.codes`` (int8), ``stored.scales`` (O,), ``bias`` (O,), ``grids`` with a
    row of scale, zero point, lowest and highest code for the input and one for the output.
    """

    bias: Tensor | None
    grids: Tensor

    def __init__(self, layer: Layer, into: Grid, out: Grid) -> None:
        super().__init__()
        self.operation = operation_of(layer)
        weight, topology = weight_of(layer)
        self.stored = IntegerWeight(weight, 8, topology)
        self.register_buffer("bias", bias_of(layer))
        self.register_buffer("grids", torch.tensor([into, out], dtype=torch.float64, device="cpu"))
        self._packed: tuple[Any, Any, Tensor] | None = None

    @property
    def input_grid(self) -> Grid:
        """What inputs are rounded to."""
        return self._grid(0)

    @property
    def output_grid(self) -> Grid:
        """What outputs lie on where the next layer reads integers."""
        return self._grid(1)

    def _grid(self, row: int) -> Grid:
        scale, *codes = self.grids[row].tolist()
        return Grid(scale, *map(int, codes))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), or images (B, C, H, W) -> (B, O, H', W'), in the dtype of the input."""
        self.operation.check(x)
        to = self.input_grid
        return self._of_codes(quantize(x, to), to).to(x.dtype)

    def requantize(self, codes: Tensor) -> Tensor:
        """Codes on the grid of the input -> codes on the grid of the output: the layer in an integer runtime."""
        return quantize(self._of_codes(codes, self.input_grid), self.output_grid)

    def _of_codes(self, codes: Tensor, of: Grid) -> Tensor:
        if self.stored.places is None and eager(codes) and codes.is_cpu and exact_in_onednn(of):
            y = self._by_onednn(codes, of)
            if y is not None:
                return self.operation.finish(y, None, None)
        sums = self.sums(codes, of)
        return self.operation.finish(sums.float(), self.stored.scales * of.scale, self.bias)

    def sums(self, codes: Tensor, of: Grid) -> Tensor:
        """The sums of products of integers, before scales: exact, as floats."""
        largest = max(of.zero_point - of.lowest, of.highest - of.zero_point) * self.stored.largest_row
        dtype = torch.float32 if largest < EXACT_SUM else torch.float64
        centred = codes.to(dtype) - of.zero_point
        return self.operation.product(centred, self.stored.integers().to(dtype), self.stored.places)

    def _by_onednn(self, codes: Tensor, of: Grid) -> Tensor | None:
        g, scales = self.operation.geometry, self.stored.scales
        zeros = torch.zeros(len(scales), dtype=torch.int64, device="cpu")
        last = (1.0, 0, torch.float32, "none", [], "")
        if g is None:
            flat = codes.reshape(-1, codes.shape[-1])
            packed = self._pack(lambda weight: _onednn.qlinear_prepack(weight, None), of)
            y = _onednn.qlinear_pointwise(flat, of.scale, of.zero_point, packed, scales, zeros, self.bias, *last)
            return y.view(*codes.shape[:-1], -1)
        (top, below), (left, right) = g.padding
        if codes.dim() != 4 or (top, left) != (below, right):
            return None
        shape = ([*g.stride], [top, left], [*g.dilation], g.groups)
        packed = self._pack(lambda weight: _onednn.qconv_prepack(weight, scales, of.scale, of.zero_point, *shape), of)
        lined = codes.contiguous(memory_format=torch.channels_last)
        return _onednn.qconv_pointwise(lined, of.scale, of.zero_point, packed, scales, zeros, self.bias, *shape, *last)

    def _pack(self, make: Any, of: Grid) -> Tensor:
        """The weight in oneDNN's layout, made again when it or what it was made for has changed."""
        made_of = self.stored.codes, self.stored.scales
        versions = (None if t.is_inference() else t._version for t in made_of)
        key = (of, *versions, *map(id, made_of))  # the tensors are kept too, so that no other one gets their ids
        if self._packed is None or self._packed[0] != key:
            self._packed = key, made_of, make(self.stored.integers())
        return self._packed[2]

    @override
    def _apply(self, fn, recurse: bool = True) -> Self:
        """As in every module, but grids and bias keep their precision: ``half()`` is for activations."""
        kept = {"grids": self.grids, "bias": self.bias}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if before is not None:
                setattr(self, name, before.to(self.stored.codes.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: the packed weight is made anew."""
        return {**self.__dict__, "_packed": None}

    @property
    def weight(self) -> Tensor:
        """The weight that the codes mean, float32, made anew: for code that reads it, as torch's encoder layers do."""
        return self.stored.dense()

    @override
    def __repr__(self) -> str:
        return f"Int8Layer({self.operation})"


def exact_in_onednn(of: Grid) -> bool:
    """Whether oneDNN's products of uint8 and int8 are exact here: two of them have to fit into 16 bits without VNNI."""
    there = torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()
    if not there or of.lowest < 0:
        return False
    return torch.cpu._is_vnni_supported() or 2 * of.highest * 127 < 2**15


@dataclass(frozen=True, kw_only=True)
class StaticInt8:
    """Linear layers and convolutions, dense or sparse -> the same in integers, with ranges from `calibrate`.

    Fold batch norms before (`fold_batch_norms`). Layers that learnt under `FakeQuantize` bring their ranges.

    Args:
        ranges: from `calibrate`; they are not needed where all layers learnt under `FakeQuantize`.
        activation_bits: 8, or 7, whose products are fast on processors without VNNI too.
        narrowest: layers of fewer features in or out stay in floating point.

    >>> from noctule.compress.quantize import calibrate
    >>> from noctule.core.convert import convert_
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    >>> print(convert_(model, StaticInt8(ranges=calibrate(model, [torch.randn(100, 64)]))))
    changed 0: Linear -> Int8Layer(64 -> 32)
    left 2: 32 -> 10 is narrower than 16: int8 products gain no time there. WeightOnly(bits=8) saves its bytes; ...
    """

    ranges: Ranges | None = None
    activation_bits: int = 8
    narrowest: int = 16

    def __post_init__(self) -> None:
        grid(0.0, 1.0, bits=self.activation_bits)

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """Refuse a model in training mode, missing ranges and weights that are not finite before any layer is replaced."""
        if any(module.training for module in modules.values()):
            raise ValueError("the model is in training mode: call model.eval() first")
        ranges = self.ranges or {}
        learnt = [m for m in modules.values() if isinstance(m, FakeQuantized) and m.activations and m.batches]
        if not ranges and not learnt:
            raise ValueError(
                "StaticInt8 needs ranges of activations: ranges=calibrate(model, batches). Ranges measured anew in each forward "
                "(dynamic int8) make convolutions 6 to 11 times slower than floating point"
            )
        if ranges and not any(name in modules for name in ranges):
            raise ValueError(f"ranges= is of another model: this one has no {', '.join([*ranges][:8])}")

        def make(name: str, module: Layer | FakeQuantized) -> nn.Module:
            if isinstance(module, FakeQuantized):
                if module not in learnt:
                    raise Leave("it learnt without quantised activations: convert it with WeightOnly()")
                return Int8Layer(module.layer, *module.grids)
            check_width(operation_of(module).widths, self.narrowest)
            if name not in ranges:
                raise Leave("no calibration batch went through it, so ranges= does not have it")
            into, out = (grid(low, high, bits=self.activation_bits) for low, high in ranges[name])
            return Int8Layer(module, into, out)

        return rule_for(modules, make, (FakeQuantized,))
