"""A weight that is stored as whole numbers."""

from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule.compress.quantize.numbers import dequantize_weight, pack, quantize_weight, unpack
from noctule.core.topology import Topology
from noctule.sparse.layers.dense_twin import dense_weight


class IntegerWeight(nn.Module):
    """The codes of a weight, packed, and the scale (O,) of each row, as buffers.

    Of a sparse weight the places are buffers too, ``row_ptr`` and ``columns``, of 16 bits where they fit: they cannot move, and a
    loaded state brings its own.

    Args:
        weight: (O, ...), or the values (N,) of a sparse layer.
        bits: 8, 4 or 1.
        topology: where the values lie.
    """

    codes: Tensor
    scales: Tensor
    row_ptr: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor, bits: int, topology: Topology | None = None) -> None:
        super().__init__()
        codes, scales = quantize_weight(weight, bits, topology)
        self.bits, self.shape = bits, tuple(codes.shape)
        self.register_buffer("codes", pack(codes, bits))
        self.register_buffer("scales", scales)
        self.dense_shape = None if topology is None else topology.shape
        self._topology = topology
        if topology is not None:
            self.register_buffer("row_ptr", topology.row_ptr.clone())
            self.register_buffer("columns", topology.columns.clone())

    @property
    def places(self) -> Topology | None:
        """Where the values of a sparse weight lie."""
        if self.dense_shape is not None and self._topology is None:
            self._topology = Topology(self.dense_shape, self.row_ptr, self.columns)
        return self._topology

    @property
    def largest_row(self) -> float:
        """The largest sum of a row's magnitudes of codes: what inputs of 1 can add up to."""
        magnitudes = self.integers().to(torch.float64).abs_()
        if (places := self.places) is None:
            sums = magnitudes.flatten(1).sum(1)
        else:
            sums = magnitudes.new_zeros(places.shape[0]).index_add_(0, places.rows(), magnitudes)
        return float(sums.max()) if len(sums) else 0.0

    def integers(self) -> Tensor:
        """The codes, one a weight, int8."""
        return unpack(self.codes, self.bits, self.shape)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes mean."""
        return dequantize_weight(self.integers(), self.scales, self.places).to(dtype)

    def dense(self) -> Tensor:
        """The weight that the codes mean, float32, zeros of a sparse one included, as a matrix."""
        if (places := self.places) is None:
            return self.floats(torch.float32)
        return dense_weight(self.floats(torch.float32), places, places.shape)

    @override
    def _apply(self, fn, recurse: bool = True) -> Self:
        """As in every module, but scales stay float32: ``half()`` is for activations."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.codes.device)
        self._topology = None
        return self

    @override
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if self.dense_shape is not None and f"{prefix}columns" in state_dict:
            given = {name: state_dict.get(f"{prefix}{name}") for name in ("row_ptr", "columns", "codes")}
            try:
                topology = Topology.from_state_dict({"shape": self.dense_shape, **given})
                size = pack(torch.zeros(topology.size, dtype=torch.int8), self.bits).shape
                if given["codes"] is None or given["codes"].shape != size:
                    raise ValueError(f"{topology.size} places do not go with these codes")
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
                return
            self.shape, self._topology, device = (topology.size,), None, self.codes.device
            self.codes = self.codes.new_empty(size)
            self.row_ptr = torch.empty_like(topology.row_ptr, device=device)
            self.columns = torch.empty_like(topology.columns, device=device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @override
    def extra_repr(self) -> str:
        return f"{' x '.join(map(str, self.dense_shape or self.shape))}, bits={self.bits}"
