"""A layer whose weight is stored as whole numbers.

Shapes: B batch, I features or C channels in, O out, N stored weights of a sparse layer.
"""

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from noctule.compress.quantize.layers import Layer, weight_of, widths_of
from noctule.compress.quantize.numbers import dequantize_weight, pack, quantize_weight, unpack
from noctule.core.convert import Leave
from noctule.core.topology import Topology
from noctule.kernels import IDENTITY
from noctule.sparse.layers import SparseConv2d, SparseLayer
from noctule.sparse.layers.convolution import Geometry, sparse_convolution
from noctule.sparse.layers.dense_twin import dense_weight
from noctule.sparse.layers.product import sparse_product
from noctule.sparse.layers.surroundings import eager


class IntegerLayer(nn.Module):
    """A linear layer or a convolution, dense or sparse, with its weight as codes and a scale a row; the kinds are final.

    Its buffers are ``codes``, packed, ``scales`` (O,), ``bias`` (O,), and the places of a sparse weight, ``row_ptr`` and
    ``columns``, of 16 bits where they fit: they cannot move, and a loaded state brings its own. It is not trained any further.

    Args:
        layer: what it is made from.
        bits: 8, 4 or 1.

    Raises:
        Leave: the layer pads with something else than zeros.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    row_ptr: Tensor
    columns: Tensor

    def __init__(self, layer: Layer, bits: int) -> None:
        super().__init__()
        self.geometry, self.bits, self.widths = _geometry(layer), bits, widths_of(layer)
        self.slope = layer.epilogue.slope if isinstance(layer, SparseLayer) else 1.0
        weight, self._places = weight_of(layer)
        codes, scales = quantize_weight(weight, bits, self._places)
        self.shape, self.matrix_shape = tuple(codes.shape), None if self._places is None else self._places.shape
        self.register_buffer("codes", pack(codes, bits))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(torch.float32).clone())
        if self._places is not None:
            self.register_buffer("row_ptr", self._places.row_ptr.clone())
            self.register_buffer("columns", self._places.columns.clone())

    @abstractmethod
    @override
    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), or images (B, C, H, W) -> (B, O, H', W'), in the dtype of the input."""

    @property
    def places(self) -> Topology | None:
        """Where the values of a sparse weight lie."""
        if self.matrix_shape is not None and self._places is None:
            self._places = Topology(self.matrix_shape, self.row_ptr, self.columns)
        return self._places

    @property
    def weight(self) -> Tensor:
        """The weight that the codes mean, float32, made anew: for code that reads it, as torch's encoder layers do."""
        return self._with_zeros(self.floats(torch.float32))

    def integers(self) -> Tensor:
        """The codes, one a weight, int8: (O, ...), or (N,) of a sparse layer."""
        return unpack(self.codes, self.bits, self.shape)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """What the codes mean, in their shape."""
        return dequantize_weight(self.integers(), self.scales, self.places).to(dtype)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The input times a weight in the shape of the codes, without scales, bias and activation."""
        g = self.geometry
        if self.places is None or not eager(x):
            weight = self._with_zeros(weight)
            if g is None:
                return F.linear(x, weight)
            (top, below), (left, right) = g.padding
            if (top, left) != (below, right):
                x, top, left = F.pad(x, (left, right, top, below)), 0, 0
            return F.conv2d(x, weight, None, g.stride, (top, left), g.dilation, g.groups)
        if g is None:
            y = sparse_product(x.reshape(-1, x.shape[-1]), weight, None, self.places, IDENTITY, None)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        y = sparse_convolution(x if x.dim() == 4 else x[None], weight, None, self.places, g, IDENTITY, None)
        return y if x.dim() == 4 else y[0]

    def finish(self, product: Tensor, scales: Tensor | None = None) -> Tensor:
        """The product times a scale (O,) a row, plus the bias, through the activation."""
        row = (-1,) if self.geometry is None else (-1, 1, 1)
        y = product if scales is None else product * scales.view(row)
        return self.activation(y if self.bias is None else y + self.bias.view(row).to(y.dtype))

    def activation(self, y: Tensor) -> Tensor:
        """The activation that was fused into a sparse layer."""
        return y if self.slope == 1.0 else F.leaky_relu(y, self.slope)

    def check(self, x: Tensor) -> None:
        """Refuse an input of other features or channels."""
        if self.geometry is None:
            if x.shape[-1:] != (self.widths[0],):
                raise ValueError(f"expected inputs of {self.widths[0]} features, got shape {tuple(x.shape)}")
        elif x.dim() not in (3, 4) or x.shape[-3] != self.widths[0]:
            raise ValueError(f"expected images of {self.widths[0]} channels, got shape {tuple(x.shape)}")

    def _with_zeros(self, weight: Tensor) -> Tensor:
        if (places := self.places) is None:
            return weight
        return dense_weight(weight, places, self.geometry.weight_shape if self.geometry else places.shape)

    @override
    def _apply(self, fn, recurse: bool = True) -> Self:
        """As in every module, but what is float keeps its precision: ``half()`` is for activations."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, now in self._buffers.items():
            if now is not None and (old := before[name]) is not None and now.dtype is not old.dtype:
                self._buffers[name] = old.to(now.device)
        self._places = None
        return self

    @override
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if self.matrix_shape is not None and f"{prefix}columns" in state_dict:
            given = {name: state_dict.get(f"{prefix}{name}") for name in ("row_ptr", "columns", "codes")}
            try:
                size = Topology.from_state_dict({"shape": self.matrix_shape, **given}).size
                room = pack(torch.empty(size, dtype=torch.int8), self.bits)
                if given["codes"] is None or given["codes"].shape != room.shape:
                    raise ValueError(f"{size} places do not go with these codes")
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
                return
            self.shape, self._places = (size,), None
            self.codes, self.columns = self.codes.new_empty(room.shape), self.columns.new_empty(size)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @override
    def extra_repr(self) -> str:
        g = self.geometry
        more = "" if g is None else f", kernel_size={g.kernel_size}, stride={g.stride}"
        return f"{self.widths[0]} -> {self.widths[1]}{more}, bits={self.bits}"


def _geometry(layer: Layer) -> Geometry | None:
    """What a convolution is besides its weight; None for a linear layer."""
    if isinstance(layer, SparseConv2d):
        return layer.geometry
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.padding_mode != "zeros":
        raise Leave(f"it pads with {layer.padding_mode!r}, not with zeros")
    left, right, top, below = layer._reversed_padding_repeated_twice
    sizes: Any = (layer.kernel_size, layer.stride, ((top, below), (left, right)), layer.dilation, layer.groups)
    return Geometry(layer.in_channels, layer.out_channels, *sizes)
