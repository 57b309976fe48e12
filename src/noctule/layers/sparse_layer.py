"""What all sparse layers are: a weight of which only some places are stored, and the one way in which the places change.

Shapes: O rows and I columns of the weight as a matrix, N stored weights.
"""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from noctule.kernels import IDENTITY, Epilogue
from noctule.layers.product import Watch
from noctule.topology import Remap, Topology, check_weights


class SparseLayer(nn.Module):
    """A layer that stores, computes and learns the non-zeros of its weight only; the kinds are final classes.

    Its parameters are ``values`` (N,), in the order of ``topology``, and ``bias`` (O,). A kind says what its forward is, how it
    comes from and goes to its dense twin, and what the gradient would be at places that it does not have.

    Args:
        shape: of the weight as a matrix, (O, I).
        density: the share of the places that is stored, in (0, 1]; give this, or ``weights``, or ``topology``.
        weights: how many weights are stored.
        topology: which places are stored.
        bias: whether there is one.
        generator: where the random places and values come from.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    origin: type[nn.Module] | None = None
    """The class of the dense layer that it was made from, where that is not the one of its kind (see `noctule.layers.foreign`)."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        density: float | None,
        weights: int | None,
        topology: Topology | None,
        bias: bool,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Draw the places and the values in O(N)."""
        super().__init__()
        if sum(given is not None for given in (density, weights, topology)) != 1:
            raise ValueError("say how sparse the layer is: one of density=, weights= or topology=")
        if density is not None:
            weights = weights_at(density, shape)
        if topology is None:
            assert weights is not None
            check_weights(weights, shape)
            topology = Topology.random(shape, weights, generator=generator)
            device = torch.get_default_device() if device is None else device
        elif topology.shape != shape:
            raise ValueError(f"the topology has shape {topology.shape}, the layer {shape} (out, in)")
        self.epilogue = IDENTITY
        self.watch: Watch | None = None
        self.topology = topology.to(device) if device is not None else topology
        factory: dict[str, Any] = {"device": self.topology.device if device is None else device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(topology.size, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], **factory)) if bias else None)
        self._remap_checks: OrderedDict[int, Callable[[SparseLayer, Remap], None]] = OrderedDict()
        self._remap_hooks: OrderedDict[int, Callable[[SparseLayer, dict[str, nn.Parameter], Remap], None]] = (
            OrderedDict()
        )
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
        return (max(self.weights, 1) / max(self.topology.shape[0], 1)) ** -0.5 if self.weights else 0.0

    @property
    def weights(self) -> int:
        """How many weights are stored: N."""
        return self.topology.size

    @property
    def density(self) -> float:
        """Stored weights over the places of a dense layer."""
        return self.topology.density

    # -- what a kind says -----------------------------------------------------------------------------------------

    @abstractmethod
    def respond(self, x: Tensor) -> Tensor:
        """What the layer makes of an input, without dropout and autograd; both as ``watch`` shows them."""

    @abstractmethod
    def gradient_at(self, topology: Topology, dy: Tensor, x: Tensor) -> Tensor:
        """The gradient (N',) at the places of any topology of this shape, of what ``watch`` was shown."""

    @abstractmethod
    def gradient_rows(self, start: int, stop: int, dy: Tensor, x: Tensor) -> Tensor:
        """The rows from ``start`` to ``stop`` (excluded) of the dense gradient, (stop - start, I)."""

    @classmethod
    @abstractmethod
    def from_dense(
        cls,
        dense: Any,
        *,
        density: float | None = None,
        weights: int | None = None,
        topology: Topology | None = None,
    ) -> Self:
        """The weights of a dense layer that are largest, or lie in ``topology``, or (with none given) are not zero."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """A dense layer with the same function (without the epilogue), zeros included."""

    @abstractmethod
    def _take_shape(self, topology: Topology) -> None:
        """Note the widths of a new topology, or raise ValueError, having noted nothing, where they cannot be had."""

    # -- changing places ------------------------------------------------------------------------------------------

    def remap_(self, topology: Topology, remap: Remap, new: float | Tensor = 0.0) -> None:
        """Move to another topology: values, bias and their gradients follow ``remap``; whoever keeps state is told.

        A parameter with as many numbers as before stays the same object; otherwise a new one takes its place. Checks that
        refuse the change do so before anything moved.

        Args:
            topology: the new places; where its shape is another one, ``remap`` says which row and column is which, as that
                of `resize` does.
            remap: the old slot of each new one.
            new: first value of the new connections, a number or a (N_new,) tensor; a new row's bias is zero.
        """
        self.check_remap(topology, remap)
        old = dict(self.named_parameters(recurse=False))
        parts = {name: part for name in old if (part := remap.of(name)) is not None}
        with torch.no_grad():
            moved = {name: part.apply(old[name], new if name == "values" else 0.0) for name, part in parts.items()}
            self._take_shape(topology)
            self.topology = topology
            for name, part in parts.items():
                setattr(self, name, carried(old[name], moved[name], part))
        for hook in tuple(self._remap_hooks.values()):
            hook(self, old, remap)

    def check_remap(self, topology: Topology, remap: Remap) -> None:
        """Refuse, without moving anything, what `remap_` would refuse.

        Raises:
            ValueError: the remap does not lead from here to this topology, or somebody who keeps state cannot follow.
        """
        if (remap.old_size, remap.new_size) != (self.weights, topology.size):
            raise ValueError(
                f"a remap of {remap.old_size} to {remap.new_size} slots does not lead from {self.weights} "
                f"to {topology.size} weights"
            )
        if remap.resized(self.topology.shape) != topology.shape:
            raise ValueError(
                f"this remap does not say how a layer of shape {self.topology.shape} becomes one of {topology.shape}: "
                "take that of resize, which names the rows and columns that stay"
            )
        for check in tuple(self._remap_checks.values()):
            check(self, remap)

    def register_remap_check(self, check: Callable[["SparseLayer", Remap], None]) -> RemovableHandle:
        """Call ``check(layer, remap)`` before every change of places; an exception there refuses it."""
        return _register(self._remap_checks, check)

    def register_remap_hook(
        self, hook: Callable[["SparseLayer", dict[str, nn.Parameter], Remap], None]
    ) -> RemovableHandle:
        """Call ``hook(layer, old, remap)`` after every change of places, ``old`` being the parameters by name before it."""
        return _register(self._remap_hooks, hook)

    # -- what kinds share -----------------------------------------------------------------------------------------

    def _take_weights(self, dense: Any) -> Self:
        """Values, bias, what is trained and the mode of a dense twin."""
        with torch.no_grad():
            self.values.copy_(dense.weight.detach().flatten()[self.topology.keys().to(dense.weight.device)])
            if self.bias is not None:
                self.bias.copy_(dense.bias)
                self.bias.requires_grad_(dense.bias.requires_grad)
        self.values.requires_grad_(dense.weight.requires_grad)
        return self.train(dense.training)

    def _give_weights(self, dense: Any) -> Any:
        """The same, the other way."""
        with torch.no_grad():
            dense.weight.zero_().view(-1)[self.topology.keys()] = self.values
            if self.bias is not None:
                dense.bias.copy_(self.bias)
                dense.bias.requires_grad_(self.bias.requires_grad)
        dense.weight.requires_grad_(self.values.requires_grad)
        return dense.train(self.training)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the values in the dtype of the product: that of the values, or bfloat16 where autocast says so."""
        dtype = self.values.dtype
        if torch.is_autocast_enabled(x.device.type):
            if dtype is torch.float32 and torch.get_autocast_dtype(x.device.type) is torch.bfloat16:
                dtype = torch.bfloat16
        elif x.dtype is not dtype:
            raise ValueError(f"inputs are {x.dtype} but the layer's values {dtype}: convert one of them with .to()")
        return x.to(dtype), self.values.to(dtype)

    def _epilogue_now(self) -> Epilogue:
        """The epilogue of this forward: a dropout mask of its own in training, none in evaluation."""
        if not self.epilogue.dropout:
            return self.epilogue
        if not self.training:
            return replace(self.epilogue, dropout=0.0)
        return replace(self.epilogue, seed=int(torch.randint(2**62, (), device="cpu")))

    def _compiled_dropout(self) -> tuple[Tensor, float]:
        """Seed and rate of this forward's dropout inside a compiled graph."""
        if self.watch is not None:
            raise RuntimeError(
                "a method watches this layer's gradients, which a compiled graph does not show: run it in eager mode"
            )
        dropout = self.epilogue.dropout if self.training else 0.0
        seed = torch.randint(2**62, (), device="cpu") if dropout else torch.zeros((), dtype=torch.int64, device="cpu")
        return seed, dropout

    def _text(self) -> str:
        text = f"weights={self.weights} ({self.density:.2%}), bias={self.bias is not None}"
        if self.epilogue.slope != 1.0:
            text += f", slope={self.epilogue.slope:g}"
        return text + (f", dropout={self.epilogue.dropout:g}" if self.epilogue.dropout else "")

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
                if topology.shape != self.topology.shape:
                    raise ValueError(
                        f"a layer of shape {topology.shape} does not fit {self.topology.shape}: "
                        "where neurons were removed in training, call resize_to(model, state) before"
                    )
                if values.shape != (topology.size,):
                    raise ValueError(f"{tuple(values.shape)} values do not match {topology.size} places")
                if topology != self.topology:
                    self.remap_(topology, Remap.between(self.topology, topology))
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
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


def weights_at(density: float, shape: tuple[int, int]) -> int:
    """How many weights a layer of this shape and density has: at least one where it has places."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    places = shape[0] * shape[1]
    return max(1, round(density * places)) if places else 0


def places_of(weight_OI: Tensor, density: float | None, weights: int | None, topology: Topology | None) -> Topology:
    """Which places of a dense weight stay: the largest, those of ``topology``, or (with nothing given) the non-zeros."""
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    if sum(given is not None for given in (density, weights, topology)) > 1:
        raise ValueError("say once how sparse the layer is: one of density=, weights= or topology=")
    if topology is not None:
        return topology
    if density is not None:
        weights = weights_at(density, shape)
    flat = weight_OI.flatten()
    if weights is None:
        return Topology.from_keys(shape, flat.nonzero()[:, 0])
    check_weights(weights, shape)
    return Topology.from_keys(shape, flat.abs().topk(weights).indices.sort().values)


def carried(old: nn.Parameter, moved: Tensor, remap: Remap) -> nn.Parameter:
    """The parameter with these numbers: the same object where the shape stays, else a new one; its gradient moves too."""
    gradient = None if old.grad is None else remap.apply(old.grad.flatten()).view(moved.shape)
    new = old if moved.shape == old.shape else nn.Parameter(moved, requires_grad=old.requires_grad)
    new.copy_(moved)
    new.grad = gradient
    return new


def _register(hooks: OrderedDict[int, Any], hook: Any) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
