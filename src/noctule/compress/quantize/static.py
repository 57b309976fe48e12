"""Linear layers and convolutions in integer arithmetic, with ranges of activations that were observed before.

Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko 2018, arXiv 1712.05877. Differs from the paper: weights are symmetric
with a scale a row (Krishnamoorthi 2018, arXiv 1806.08342), the bias is float32, and each layer returns floats, which the next one
rounds: activations and sums between layers keep their precision.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from noctule.compress.quantize.calibration import Ranges
from noctule.compress.quantize.fake import FakeQuantized
from noctule.compress.quantize.integer_layer import IntegerLayer
from noctule.compress.quantize.layers import Layer, check_evaluation, check_width, rule_for
from noctule.compress.quantize.numbers import Grid, grid, over_rows, quantize
from noctule.core.convert import Leave, Rule
from noctule.sparse.layers.surroundings import eager

EXACT_SUM = 2**24
"""Integers up to this are exact in float32, so sums of products of codes below it are exact too."""

_onednn: Any = torch.ops.onednn


class Int8Layer(IntegerLayer):
    """A layer of int8 weights and uint8 inputs, whose products and sums are exact.

    Dense products are oneDNN's on x86 processors. Without VNNI it adds pairs of products in 16 bits, which saturate with inputs
    of 8 bits: there it is called twice, for their upper 7 bits and for the lowest. It keeps packed copies of the weight from the
    first forward on: one, or for a convolution that is called twice two. Elsewhere, and for sparse layers, the integers are
    multiplied as floats wide enough for the sums to be exact.

    Its buffers are what an integer runtime needs: those of an `IntegerLayer`, and ``input_grid``, the scale, the zero point and the
    highest code of its inputs. What a layer's outputs are rounded to is the grid of the layer that reads them.
    """

    input_grid: Tensor

    def __init__(self, layer: Layer, into: Grid) -> None:
        super().__init__(layer, 8)
        self.register_buffer("input_grid", torch.tensor(into, dtype=torch.float64, device="cpu"))
        self._packed: dict[Grid | None, Tensor] = {}
        self._packed_from: tuple[Any, ...] = ()

    @property
    def grid(self) -> Grid:
        """What inputs are rounded to."""
        scale, *codes = self.input_grid.tolist()
        return Grid(scale, *map(int, codes))

    @override
    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        of = self.grid
        codes = quantize(x, of)
        if self.places is None and eager(codes) and codes.is_cpu and onednn_has_int8():
            if exact_in_onednn(of):
                y = self.activation(self._by_onednn(codes, of, self.bias))
            else:
                upper = self._by_onednn(codes >> 1, Grid(2 * of.scale, of.zero_point >> 1, of.highest >> 1), self.bias)
                y = self.activation(upper.add_(self._by_onednn(codes & 1, Grid(of.scale, of.zero_point & 1, 1), None)))
        else:
            y = self.finish(self.sums(codes, of).float(), self.scales * of.scale)
        return y.to(x.dtype)

    def sums(self, codes: Tensor, of: Grid) -> Tensor:
        """The sums of products of integers, before scales: exact, as floats."""
        integers = self.integers()
        rows = over_rows(integers.to(torch.float64).abs_(), "sum", self.places)
        largest = max(of.zero_point, of.highest - of.zero_point) * float(rows.max() if len(rows) else 0.0)
        dtype = torch.float32 if largest < EXACT_SUM else torch.float64
        return self.product(codes.to(dtype) - of.zero_point, integers.to(dtype))

    def _by_onednn(self, codes: Tensor, of: Grid, bias: Tensor | None) -> Tensor:
        """Product, scales and bias."""
        g, zeros = self.geometry, torch.zeros(self.widths[1], dtype=torch.int64, device="cpu")
        last = (1.0, 0, torch.float32, "none", [], "")
        if g is None:
            flat = codes.reshape(-1, codes.shape[-1])
            packed = self._pack(None, _onednn.qlinear_prepack, None)
            y = _onednn.qlinear_pointwise(flat, of.scale, of.zero_point, packed, self.scales, zeros, bias, *last)
            return y.view(*codes.shape[:-1], self.widths[1])
        (top, below), (left, right) = g.padding
        if (top, left) != (below, right):
            codes, top, left = F.pad(codes, (left, right, top, below), value=of.zero_point), 0, 0
        shape = ([*g.stride], [top, left], [*g.dilation], g.groups)
        packed = self._pack(of, _onednn.qconv_prepack, self.scales, of.scale, of.zero_point, *shape)
        lined = (codes if codes.dim() == 4 else codes[None]).contiguous(memory_format=torch.channels_last)
        made = (packed, self.scales, zeros, bias, *shape, *last)
        y = _onednn.qconv_pointwise(lined, of.scale, of.zero_point, *made)
        return y if codes.dim() == 4 else y[0]

    def _pack(self, of: Grid | None, prepack: Any, *more: Any) -> Tensor:
        """The weight in oneDNN's layout for inputs on a grid, made again when what it was made of has changed."""
        made_of = self.codes, self.scales  # kept, so that no other tensors get their ids
        key = (*(None if t.is_inference() else t._version for t in made_of), *map(id, made_of))
        if self._packed_from[:1] != (key,):
            self._packed, self._packed_from = {}, (key, made_of)
        if of not in self._packed:
            self._packed[of] = prepack(self.integers(), *more)
        return self._packed[of]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: the packed weight is made anew."""
        return {**self.__dict__, "_packed": {}, "_packed_from": ()}


def onednn_has_int8() -> bool:
    """Whether oneDNN multiplies uint8 by int8 here."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()


def exact_in_onednn(of: Grid) -> bool:
    """Whether its products are exact: without VNNI two of them have to fit into 16 bits."""
    return torch.cpu._is_vnni_supported() or 2 * of.highest * 127 < 2**15


@dataclass(frozen=True, kw_only=True)
class StaticInt8:
    """Linear layers and convolutions, dense or sparse -> the same in integers, with ranges from `calibrate`.

    Fold batch norms before (`fold_batch_norms`). Layers that learnt under `FakeQuantize` bring their ranges.

    Args:
        ranges: from `calibrate`; they are not needed where all layers learnt under `FakeQuantize`.
        activation_bits: 8, or 7, whose products take half the time on processors without VNNI.
        narrowest: layers of fewer features in or out stay in floating point.

    >>> from noctule.compress.quantize import calibrate
    >>> from noctule.core.convert import convert_
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    >>> print(convert_(model, StaticInt8(ranges=calibrate(model, [torch.randn(100, 64)]))))
    changed 0: Linear -> Int8Layer(64 -> 32, bits=8)
    left 2: 32 -> 10 is narrower than 16: int8 products gain no time there. WeightOnly(bits=8) saves its bytes; ...
    """

    ranges: Ranges | None = None
    activation_bits: int = 8
    narrowest: int = 16

    def __post_init__(self) -> None:
        grid(0.0, 1.0, bits=self.activation_bits)

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """Refuse a model in training mode, missing ranges and weights that are not finite before any layer is replaced."""
        check_evaluation(modules.values())
        ranges = self.ranges or {}
        if not ranges and not any(
            isinstance(m, FakeQuantized) and m.activations and m.batches for m in modules.values()
        ):
            raise ValueError(
                "StaticInt8 needs ranges of activations: ranges=calibrate(model, batches). Ranges measured anew in each forward "
                "(dynamic int8) make convolutions 6 to 11 times slower than floating point"
            )
        if ranges and not any(name in modules for name in ranges):
            raise ValueError(f"ranges= is of another model: this one has no {', '.join([*ranges][:8])}")

        def make(name: str, module: Layer | FakeQuantized) -> nn.Module:
            if isinstance(module, FakeQuantized):
                if not module.activations:
                    raise Leave("it learnt without quantised activations: convert it with WeightOnly()")
                if not module.batches:
                    raise Leave("it saw no batch in training, so its inputs have no range: train it first")
                return Int8Layer(module.layer, module.grid)
            check_width(module, self.narrowest)
            if name not in ranges:
                raise Leave("no calibration batch went through it, so ranges= does not have it")
            return Int8Layer(module, grid(*ranges[name], bits=self.activation_bits))

        return rule_for(modules, make, FakeQuantized)
