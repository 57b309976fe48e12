"""A linear layer that stores, computes and learns its non-zeros only."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from noctule.kernels import IDENTITY, Epilogue
from noctule.layers.product import SparseProduct, Watch, compiled_product
from noctule.topology import Remap, Topology, check_weights


class SparseLinear(nn.Module):
    """``y = x Wᵀ + b`` over the stored places of W alone: a drop-in for ``nn.Linear`` in time and memory O(N).

    Its parameters are ``values`` (N,), in the order of ``topology``, and ``bias`` (O,). Inputs have any leading shape; outputs
    are a transposed view of a feature-major result, which the next sparse layer reads as it is. Products run in the dtype of
    ``values``, under autocast too. The first values are uniform within ``1 / sqrt(N / O)``: the rule of ``nn.Linear`` with
    the fan-in that is really there.

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

    values: nn.Parameter
    bias: nn.Parameter | None

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
        """Draw the places and the values in O(N)."""
        super().__init__()
        shape = (out_features, in_features)
        if sum(given is not None for given in (density, weights, topology)) != 1:
            raise ValueError("say how sparse the layer is: one of density=, weights= or topology=")
        if density is not None:
            weights = _weights_at(density, shape)
        if topology is None:
            assert weights is not None
            check_weights(weights, shape)
            topology = Topology.random(shape, weights, generator=generator)
            device = torch.get_default_device() if device is None else device
        elif topology.shape != shape:
            raise ValueError(f"the topology has shape {topology.shape}, the layer {shape} (out, in)")
        self.in_features, self.out_features = in_features, out_features
        self.epilogue = IDENTITY
        self.watch: Watch | None = None
        self.topology = topology.to(device) if device is not None else topology
        factory: dict[str, Any] = {"device": self.topology.device if device is None else device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(topology.size, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **factory)) if bias else None)
        self._remap_checks: OrderedDict[int, Callable[[SparseLinear, Remap], None]] = OrderedDict()
        self._remap_hooks: OrderedDict[int, Callable[[SparseLinear, nn.Parameter, Remap], None]] = OrderedDict()
        self.reset_parameters(generator=generator)

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw the values and the bias anew, uniformly within ``1 / sqrt(fan-in)`` of the sparse layer."""
        with torch.no_grad():
            for parameter in (self.values, self.bias):
                if parameter is not None:
                    drawn = torch.empty(parameter.shape, device="cpu").uniform_(
                        -self.init_bound, self.init_bound, generator=generator
                    )
                    parameter.copy_(drawn)

    @property
    def init_bound(self) -> float:
        """The largest initial weight: one over the root of the mean fan-in."""
        return (max(self.weights, 1) / max(self.out_features, 1)) ** -0.5 if self.weights else 0.0

    @property
    def weights(self) -> int:
        """How many weights are stored: N."""
        return self.topology.size

    @property
    def density(self) -> float:
        """Stored weights over the places of a dense layer."""
        return self.topology.density

    # -- the product ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"expected inputs of {self.in_features} features in the last dimension, got shape {tuple(x.shape)}"
            )
        if x.dtype != self.values.dtype:
            x = self._in_own_dtype(x)
        x_BI = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), self.in_features)
        y_BO = self._compiled(x_BI) if torch.compiler.is_compiling() else self._eager(x_BI)
        return y_BO if x.dim() == 2 else y_BO.reshape(*x.shape[:-1], self.out_features)

    def _eager(self, x_BI: Tensor) -> Tensor:
        epilogue = self.epilogue
        if epilogue.dropout:
            if not self.training:
                epilogue = Epilogue(epilogue.slope)
            else:
                seed = int(torch.randint(2**62, (), device="cpu"))
                epilogue = Epilogue(epilogue.slope, epilogue.dropout, seed)
        y_BO = SparseProduct.apply(x_BI, self.values, self.bias, self.topology, epilogue, self.watch)
        return y_BO  # type: ignore[return-value]

    def _compiled(self, x_BI: Tensor) -> Tensor:
        if self.watch is not None:
            raise RuntimeError(
                "a method watches this layer's gradients, which a compiled graph does not show: run it in eager mode"
            )
        dropout = self.epilogue.dropout if self.training else 0.0
        seed = torch.randint(2**62, (), device="cpu") if dropout else torch.zeros((), dtype=torch.int64, device="cpu")
        y_OB, *_ = compiled_product(
            x_BI, self.values, self.bias, self.topology.handle, seed, self.out_features, self.epilogue.slope, dropout
        )
        return y_OB.t()

    def _in_own_dtype(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"inputs are {x.dtype} but the layer's values {self.values.dtype}: convert one of them with .to()"
            )
        return x.to(self.values.dtype)

    # -- changing places ------------------------------------------------------------------------------------------

    def remap_(self, topology: Topology, remap: Remap, new: float | Tensor = 0.0) -> None:
        """Move to another topology: values and their gradient follow ``remap``; whoever keeps state is told.

        With as many weights as before the parameter stays the same object; otherwise a new one takes its place. Checks that
        refuse the change do so before anything moved.

        Args:
            topology: the new places.
            remap: the old slot of each new one.
            new: first value of the new connections, a number or a (N_new,) tensor.
        """
        if (remap.old_size, remap.new_size) != (self.weights, topology.size):
            raise ValueError(
                f"a remap of {remap.old_size} to {remap.new_size} slots does not lead from {self.weights} "
                f"to {topology.size} weights"
            )
        for check in tuple(self._remap_checks.values()):
            check(self, remap)
        old = self.values
        with torch.no_grad():
            moved = remap.apply(old.detach(), new)
            if remap.new_size == remap.old_size:
                old.copy_(moved)
            else:
                self.values = nn.Parameter(moved, requires_grad=old.requires_grad)
            if old.grad is not None:
                self.values.grad = remap.apply(old.grad)
            self.topology = topology
            self.out_features, self.in_features = topology.shape
        for hook in tuple(self._remap_hooks.values()):
            hook(self, old, remap)

    def register_remap_check(self, check: Callable[["SparseLinear", Remap], None]) -> RemovableHandle:
        """Call ``check(layer, remap)`` before every change of places; an exception there refuses it."""
        return _register(self._remap_checks, check)

    def register_remap_hook(self, hook: Callable[["SparseLinear", nn.Parameter, Remap], None]) -> RemovableHandle:
        """Call ``hook(layer, old_values, remap)`` after every change of places."""
        return _register(self._remap_hooks, hook)

    # -- from and to dense ----------------------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        density: float | None = None,
        weights: int | None = None,
        topology: Topology | None = None,
    ) -> Self:
        """The weights of a dense layer that are largest, or lie in ``topology``, or (with none given) are not zero."""
        weight = linear.weight.detach()
        shape = (linear.out_features, linear.in_features)
        if sum(given is not None for given in (density, weights, topology)) > 1:
            raise ValueError("say once how sparse the layer is: one of density=, weights= or topology=")
        if density is not None:
            weights = _weights_at(density, shape)
        if topology is None:
            flat = weight.flatten()
            if weights is None:
                keys = flat.nonzero()[:, 0]
            else:
                check_weights(weights, shape)
                keys = flat.abs().topk(weights).indices.sort().values
            topology = Topology.from_keys(shape, keys)
        layer = cls(
            linear.in_features,
            linear.out_features,
            topology=topology,
            bias=linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            layer.values.copy_(weight.flatten()[topology.keys().to(weight.device)])
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
                layer.bias.requires_grad_(linear.bias.requires_grad)
        layer.values.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the same function (without the epilogue): O x I weights, zeros included."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        with torch.no_grad():
            linear.weight.zero_().view(-1)[self.topology.keys()] = self.values
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        linear.weight.requires_grad_(self.values.requires_grad)
        return linear.train(self.training)

    # -- nn.Module's manners --------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """The places, which travel in ``state_dict`` beside the values."""
        return self.topology.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Nothing: `_load_from_state_dict` took the places before the values."""

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        state, values = state_dict.get(prefix + "_extra_state"), state_dict.get(prefix + "values")
        if state is not None and values is not None:
            try:
                topology = Topology.from_state_dict(state).to(self.values.device)
                if topology.shape != (self.out_features, self.in_features):
                    raise ValueError(
                        f"a layer of shape {topology.shape} does not fit {(self.out_features, self.in_features)}"
                    )
                if values.shape != (topology.size,):
                    raise ValueError(f"{tuple(values.shape)} values do not match {topology.size} places")
                if topology != self.topology:
                    self.remap_(topology, Remap.between(self.topology, topology))
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or 'SparseLinear'}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.topology = self.topology.to(self.values.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: remap hooks and the watch stay with the original."""
        return {**self.__dict__, "_remap_checks": OrderedDict(), "_remap_hooks": OrderedDict(), "watch": None}

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        text = f"{self.in_features}, {self.out_features}, weights={self.weights} ({self.density:.2%}), bias={self.bias is not None}"
        if self.epilogue.slope != 1.0:
            text += f", slope={self.epilogue.slope:g}"
        return text + (f", dropout={self.epilogue.dropout:g}" if self.epilogue.dropout else "")


def _weights_at(density: float, shape: tuple[int, int]) -> int:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    places = shape[0] * shape[1]
    return max(1, round(density * places)) if places else 0


def _register(hooks: OrderedDict[int, Any], hook: Any) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
