"""A linear layer that stores, computes and learns its non-zeros only."""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import IDENTITY, Epilogue
from noctule.sparse.layers.dense_twin import dense_epilogue, dense_weight, twin_of
from noctule.sparse.layers.derivatives import any_order
from noctule.sparse.layers.operators import compiled_product, places_now
from noctule.sparse.layers.product import sparse_product
from noctule.sparse.layers.sparse_layer import SparseLayer
from noctule.sparse.layers.stand_in import StandIn
from noctule.sparse.layers.surroundings import eager, transformed, written_down
from noctule.sparse.pattern import chosen_places


class SparseLinear(SparseLayer):
    """``y = x Wᵀ + b`` over the stored places of W alone: a drop-in for ``nn.Linear`` in time and memory O(N).

    Its parameters are ``values`` (N,), in the order of ``topology``, and ``bias`` (O,). Inputs have any leading shape; outputs
    are a transposed view of a feature-major result, which the next sparse layer reads as it is. Products run in the dtype of
    ``values``, or in bfloat16 under an autocast to it; sums are float32. The first values are uniform within
    ``1 / sqrt(N / O)``: the rule of ``nn.Linear`` with the fan-in that is really there.

    Args:
        in_features: I.
        out_features: O.
        density: the share of the places that is stored, in (0, 1]; give this, or ``weights``, or ``topology``.
        weights: how many weights are stored.
        topology: which places are stored.
        bias: whether there is one.
        generator: where the random places and values come from.

    >>> layer = SparseLinear(1000, 500, density=0.05)
    >>> layer(torch.randn(8, 1000)).shape, layer.weights
    (torch.Size([8, 500]), 25000)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        density: float | None = None,
        weights: int | None = None,
        topology: Topology | None = None,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        topology, device = chosen_places(
            (out_features, in_features), density, weights, topology, generator=generator, device=device
        )
        super().__init__(topology, bias=bias, generator=generator, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if not eager(x):
            return self._elsewhere(x, self.bias, self.epilogue)
        x_BI, values = self._factors(x)
        y_BO = sparse_product(x_BI, values, self.bias, self.topology, self._epilogue_now(self.epilogue), self.watch)
        return y_BO if x.dim() == 2 else y_BO.reshape(*x.shape[:-1], self.out_features)

    def _elsewhere(self, x: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
        """The same in graphs, transforms and traces, and for unusual inputs."""
        if written_down(x):
            y = F.linear(x, dense_weight(self.values, self.topology, self.topology.shape), bias)
            return dense_epilogue(y, epilogue, self.training)
        if x.is_nested:
            parts = x.unbind()
            y = self(torch.cat(parts)).split([len(part) for part in parts])
            return torch.nested.as_nested_tensor(list(y), layout=x.layout)
        x_BI, values = self._factors(x)
        if torch.compiler.is_compiling():
            seed, dropout = self._compiled_dropout(epilogue)
            places = places_now(self.topology)
            y_OB, *_ = compiled_product(x_BI, values, bias, places, seed, self.out_features, epilogue.slope, dropout)
            y_BO = y_OB.t()
        elif transformed():
            y_BO = any_order(x_BI, values, bias, self.topology, epilogue, self.training)
        else:
            y_BO = sparse_product(x_BI, values, bias, self.topology, self._epilogue_now(epilogue), self.watch)
        return y_BO if x.dim() == 2 else y_BO.reshape(*x.shape[:-1], self.out_features)

    @override
    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., I) -> (B, I) and the values (N,)."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"expected inputs of {self.in_features} features in the last dimension, got shape {tuple(x.shape)}"
            )
        x, values = super()._factors(x)
        return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), self.in_features), values

    @property
    def weight(self) -> Tensor:
        """A stand-in for the dense weight (O, I), for other people's code: it has the product with an input, no numbers."""
        return StandIn(self.values, self.topology.shape, self._product)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not eager(x):
            return self._elsewhere(x, bias, IDENTITY)
        y_BO = sparse_product(*self._factors(x), bias, self.topology, IDENTITY, self.watch)
        return y_BO.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    @override
    def respond(self, x: Tensor) -> Tensor:
        """(I, B) -> (O, B), through the activation, without dropout."""
        return kernels.spmm(self.topology, self.values, x, self.bias, Epilogue(self.epilogue.slope))[0]

    @override
    def gradient_at(self, topology: Topology, dy: Tensor, x: Tensor) -> Tensor:
        """The gradient at any places, of dy (O, B) and x (I, B)."""
        return kernels.sddmm(topology, dy, x)

    @override
    def gradient_rows(self, start: int, stop: int, dy: Tensor, x: Tensor) -> Tensor:
        """Rows of the dense gradient, of dy (O, B) and x (I, B)."""
        return dy[start:stop] @ x.t()

    @classmethod
    @override
    def _like(cls, dense: nn.Linear, topology: Topology) -> Self:
        return cls(
            dense.in_features,
            dense.out_features,
            topology=topology,
            bias=dense.bias is not None,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )

    @override
    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the same function (without the epilogue): O x I weights, zeros included."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        return self._give_weights(linear)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` takes instead, which can hold torch's own modules only."""
        return twin_of(self)

    @override
    def _take_shape(self, topology: Topology) -> None:
        self.out_features, self.in_features = topology.shape

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._text()}"
