"""What all sparse layers are: a weight of which only some places are stored, and the one way in which the places change.

Shapes: O rows and I columns of the weight as a matrix, N stored weights.
"""

import copy
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from noctule.core.remap import Remap, carried
from noctule.core.topology import Topology
from noctule.kernels import IDENTITY, Epilogue
from noctule.sparse.layers.copies import Kinship
from noctule.sparse.layers.loading import Loading
from noctule.sparse.layers.places import from_tensor, to_tensor
from noctule.sparse.layers.product import Watch
from noctule.sparse.layers.stand_in import StandIn
from noctule.sparse.pattern import kept_places


class SparseLayer(nn.Module):
    """A layer that stores, computes and learns the non-zeros of its weight only; the kinds are final classes.

    Its parameters are ``values`` (N,), in the order of ``topology``, and ``bias`` (O,). A kind says what its forward is, how it
    comes from and goes to its dense twin, and what the gradient would be at places that it does not have.

    Args:
        topology: which places are stored.
        bias: whether there is one.
        generator: where the first values come from.
        device: of the parameters, and of the topology unless it is ``meta``.
        dtype: of the parameters.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    kinship: Kinship
    loading: Loading
    unverified: bool
    """Whether the numbers may belong to other places than these, so that the next use has to `verify` them."""
    origin: type[nn.Module] | None = None
    """The class of the dense layer that it was made from, where that is not the one of its kind (see `layers.foreign`)."""

    def __init__(
        self,
        topology: Topology,
        *,
        bias: bool,
        generator: torch.Generator | None,
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.epilogue = IDENTITY
        self.kinship, self.loading, self.unverified = Kinship(), Loading(), False
        self.watch: Watch | None = None
        self.topology = topology.to(device)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(topology.size, **factory))
        self.loading.pair(self.values)
        self.register_parameter("bias", nn.Parameter(torch.empty(topology.shape[0], **factory)) if bias else None)
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

    @override
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" or isinstance(param, StandIn):
            raise TypeError(
                f"{type(self).__name__} has no dense weight that could be set, pruned or reparametrized: do it to the parameter "
                "'values', or before the layer is converted, or make a new layer with from_dense(dense)"
            )
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in every module; the container of ``torch.nn.utils.parametrize`` gets room for a tensor named "values"."""
        super().__setattr__(name, _Parametrizations() if name == "parametrizations" else value)

    # -- what a kind adds -----------------------------------------------------------------------------------------

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
    def _like(cls, dense: Any, topology: Topology) -> Self:
        """A layer of the widths of a dense one, at these places, with values of its own."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """A dense layer with the same function (without the epilogue), zeros included."""

    @abstractmethod
    def _take_shape(self, topology: Topology) -> None:
        """Note the widths of a new topology, or raise ValueError, having noted nothing, where they cannot be had."""

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        *,
        density: float | None = None,
        weights: int | None = None,
        topology: Topology | None = None,
    ) -> Self:
        """The weights of a dense layer that are largest, or lie in ``topology``, or (with none given) are not zero."""
        places = kept_places(dense.weight.detach().flatten(1), density, weights, topology)
        return cls._like(dense, places)._take_weights(dense)

    # -- changing places ------------------------------------------------------------------------------------------

    def remap_(self, topology: Topology, remap: Remap, new: float | Tensor = 0.0) -> None:
        """Move to another topology: values, bias and their gradients follow ``remap``, then the remap hooks are called.

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
        self._has_moved(old, remap)

    def _has_moved(self, old: dict[str, nn.Parameter], remap: Remap) -> None:
        """Note which copies have not made a change of places, and call the hooks."""
        self.loading.moved(self)
        if not remap.loaded:
            self.kinship.leave()
        self.unverified = self.kinship.moved(self) or self.unverified
        for hook in tuple(self._remap_hooks.values()):
            hook(self, old, remap)

    def check_remap(self, topology: Topology, remap: Remap) -> None:
        """Refuse, without moving anything, what `remap_` would refuse.

        Raises:
            ValueError: the remap does not lead from here to this topology, or something that is kept per weight cannot follow.
        """
        if "values" not in self._parameters:
            raise ValueError(
                "this layer's values are computed from other parameters (weight_norm, spectral_norm, prune, parametrize), which "
                "cannot follow when places move: remove that first, as with remove_parametrizations(layer, 'values') or "
                "prune.remove(layer, 'values')"
            )
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
        if hasattr(self.values, "placements") and not (remap.loaded and remap.new_size == remap.old_size):
            raise ValueError(
                "the values of this layer are sharded by fully_shard, each worker holding a part, so its connections cannot move: "
                "train with EverySync or DistributedDataParallel, which keep them whole, or keep the connections where they are"
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
        if self.unverified:
            self.verify()
        with torch.no_grad():
            dense.weight.zero_().view(-1)[self.topology.keys()] = self.values
            if self.bias is not None:
                dense.bias.copy_(self.bias)
                dense.bias.requires_grad_(self.bias.requires_grad)
        dense.weight.requires_grad_(self.values.requires_grad)
        return dense.train(self.training)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the values in the dtype of the product: that of the values, or bfloat16 where autocast says so."""
        if self.unverified and not torch.compiler.is_compiling():
            self.verify()
        values = self.values  # once: it may be computed, by a parametrization
        dtype = values.dtype
        if torch.is_autocast_enabled(x.device.type):
            if dtype is torch.float32 and torch.get_autocast_dtype(x.device.type) is torch.bfloat16:
                dtype = torch.bfloat16
        elif x.dtype is not dtype:
            raise ValueError(f"inputs are {x.dtype} but the layer's values {dtype}: convert one of them with .to()")
        return (x, values) if x.dtype is values.dtype is dtype else (x.to(dtype), values.to(dtype))

    def _epilogue_now(self, epilogue: Epilogue) -> Epilogue:
        """An epilogue in this forward: a dropout mask of its own in training, none in evaluation."""
        if not epilogue.dropout:
            return epilogue
        if not self.training:
            return replace(epilogue, dropout=0.0)
        return replace(epilogue, seed=int(torch.randint(2**62, (), device="cpu")))

    def _compiled_dropout(self, epilogue: Epilogue) -> tuple[Tensor, float]:
        """Seed and rate of this forward's dropout inside a compiled graph."""
        if self.watch is not None:
            raise RuntimeError(
                "a method watches this layer's gradients, which a compiled graph does not show: run it in eager mode"
            )
        dropout = epilogue.dropout if self.training else 0.0
        seed = torch.randint(2**62, (), device="cpu") if dropout else torch.zeros((), dtype=torch.int64, device="cpu")
        return seed, dropout

    def _text(self) -> str:
        text = f"weights={self.weights} ({self.density:.2%}), bias={self.bias is not None}"
        if self.epilogue.slope != 1.0:
            text += f", slope={self.epilogue.slope:g}"
        return text + (f", dropout={self.epilogue.dropout:g}" if self.epilogue.dropout else "")

    # -- as an nn.Module --------------------------------------------------------------------------------------

    @override
    def get_extra_state(self) -> Tensor:
        """The places, which travel in ``state_dict`` beside the values, as a tensor (see `noctule.sparse.layers.places`)."""
        if self.unverified:
            self.verify()
        self.unverified = True
        return self.loading.given.add(to_tensor(self.topology))

    @override
    def set_extra_state(self, state: Any) -> None:
        """Move to the places of a state that comes without values, by a tool that loads piece by piece; these are to follow.

        In `load_state_dict`, `_load_from_state_dict` has done so before the values.
        """
        self.loading.take(self, state)

    @property
    def _extra_state(self) -> Tensor:
        """The places, by the name they have in a state dict, as ``torch.func.functional_call`` looks for and puts them."""
        return to_tensor(self.topology)

    @_extra_state.setter
    def _extra_state(self, places: Tensor) -> None:
        if not torch.equal(places, to_tensor(self.topology)) and from_tensor(places) != self.topology:
            raise ValueError(
                "these values belong to other places than the layer has: load them by load_state_dict, which moves the places too, "
                "or call a model that has these places"
            )

    def verify(self) -> None:
        """Raise RuntimeError where the numbers of the layer, or of a copy of it, belong to other places."""
        around = self.loading.check(self)
        self.unverified = self.kinship.check(self) | around

    @override
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        try:
            load = self.loading.begin(self, state_dict, prefix)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        super()._load_from_state_dict(
            load.state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key != load.kept_aside]
        self.loading.end(self, load)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.topology = self.topology.to(self.values.device)
        if self.kinship.written is not None:
            self.kinship.loaded(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: remap hooks and the watch stay with the original."""
        kept = {"_remap_checks": OrderedDict(), "_remap_hooks": OrderedDict(), "watch": None, "kinship": None}
        return {**self.__dict__, **kept}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "kinship": Kinship()})
        self.loading.pair(self.values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy, which is kept track of as long as its numbers may be updated from this layer's (see `layers.copies`)."""
        if self.unverified:
            self.verify()
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self.kinship.copied(self, new)
        return new


class _Parametrizations(nn.ModuleDict):
    """A dictionary of modules one of which may be called like its method ``values``."""

    def add_module(self, name: str, module: Any) -> None:
        self._modules[name] = module


def _register(hooks: OrderedDict[int, Any], hook: Any) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
