"""What all sparse layers are: a weight of which only some places are stored, and the one way in which the places change.

Shapes: O rows and I columns of the weight as a matrix, N stored weights.
"""

import copy
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from noctule.core.remap import Remap
from noctule.core.topology import Topology, check_weights
from noctule.kernels import IDENTITY, Epilogue
from noctule.sparse.layers.copies import Kinship
from noctule.sparse.layers.places import Given, from_tensor, to_tensor
from noctule.sparse.layers.product import Watch
from noctule.sparse.layers.stand_in import StandIn


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
    kinship: Kinship
    doubtful: bool
    """Whether the numbers may belong to other places than these: looked at in every use."""
    origin: type[nn.Module] | None = None
    """The class of the dense layer that it was made from, where that is not the one of its kind (see `layers.foreign`)."""

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
        self.kinship, self.doubtful = Kinship(), False
        self._held: Tensor | None = None
        self._awaits_values = False
        self._given = Given()
        self._taken: Any = None
        self._paired: Any = None
        """A reference to the values that are of these places, unless others were put in as an attribute."""
        self.watch: Watch | None = None
        self.topology = topology.to(device) if device is not None else topology
        factory: dict[str, Any] = {"device": self.topology.device if device is None else device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(topology.size, **factory))
        self._paired = ref(self.values)
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

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in every module, but for a dense weight."""
        if name == "weight" or isinstance(param, StandIn):
            raise TypeError(
                f"{type(self).__name__} has no dense weight that could be set, pruned or reparametrized: do it to the parameter "
                "'values', or before the layer is converted, or make a new layer with from_dense(dense)"
            )
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in every module; the container of ``torch.nn.utils.parametrize`` gets room for a tensor named "values"."""
        super().__setattr__(name, _Parametrizations() if name == "parametrizations" else value)

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
        self._told(old, remap)

    def _told(self, old: dict[str, nn.Parameter], remap: Remap) -> None:
        """Tell of a change of places, and note which copies have not made it."""
        self._awaits_values, self._paired = False, ref(self.values)
        if not remap.loaded:
            self.kinship.leave()
        self._given.moved(self.topology)
        self.doubtful = self.kinship.moved(self) or self.doubtful
        for hook in tuple(self._remap_hooks.values()):
            hook(self, old, remap)

    def check_remap(self, topology: Topology, remap: Remap) -> None:
        """Refuse, without moving anything, what `remap_` would refuse.

        Raises:
            ValueError: the remap does not lead from here to this topology, or somebody who keeps state cannot follow.
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
        if "values" not in self._parameters:
            raise ValueError(
                "the values of this layer are computed from others (a parametrization, weight_norm or pruning of torch), which "
                "cannot follow a change of places: remove that first, as by torch.nn.utils.parametrize.remove_parametrizations"
                "(layer, 'values'), or leave the layer's connections where they are"
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
        if self.doubtful:
            self.check_doubts()
        with torch.no_grad():
            dense.weight.zero_().view(-1)[self.topology.keys()] = self.values
            if self.bias is not None:
                dense.bias.copy_(self.bias)
                dense.bias.requires_grad_(self.bias.requires_grad)
        dense.weight.requires_grad_(self.values.requires_grad)
        return dense.train(self.training)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the values in the dtype of the product: that of the values, or bfloat16 where autocast says so."""
        if self.doubtful and not torch.compiler.is_compiling():
            self.check_doubts()
        values = self.values  # once: it may be computed, by a parametrization
        dtype = values.dtype
        if torch.is_autocast_enabled(x.device.type):
            if dtype is torch.float32 and torch.get_autocast_dtype(x.device.type) is torch.bfloat16:
                dtype = torch.bfloat16
        elif x.dtype is not dtype:
            raise ValueError(f"inputs are {x.dtype} but the layer's values {dtype}: convert one of them with .to()")
        return x.to(dtype), values.to(dtype)

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

    # -- nn.Module's manners --------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The places, which travel in ``state_dict`` beside the values, as a tensor (see `noctule.sparse.layers.places`)."""
        if self.doubtful:
            self.check_doubts()
        self.doubtful = True
        return self._given.add(to_tensor(self.topology))

    def set_extra_state(self, state: Any) -> None:
        """Move to the places of a state that comes without values, by a tool that loads piece by piece; these are to follow.

        In `load_state_dict`, `_load_from_state_dict` has done so before the values.
        """
        if state is not self._taken:
            old, put = dict(self.named_parameters(recurse=False)), self._paired() is not self.values
            remap = self._take_places(
                state, self.values if put else None
            )  # values that were put in before are of these places
            if remap is not None:
                self._told(old, remap)
            self._taken, self._paired = state, ref(self.values)

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

    def check_doubts(self) -> None:
        """Raise RuntimeError where the numbers that the layer has, or a copy of it, belong to other places."""
        if self._held is not None:
            raise RuntimeError(
                f"{self._held.numel()} values of a {type(self).__name__} were loaded without their places, and wait for them: "
                "load '_extra_state' of the same state dict too"
            )
        self.doubtful = self.kinship.check(self) | self._given.check(self.topology)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        places, values = state_dict.get(prefix + "_extra_state"), state_dict.get(prefix + "values")
        own = values is not None and _same_memory(values, self.values)
        if type(places).__name__ == "_EXTRA_STATE":  # from torch's set_model_state_dict, for what a shard does not hold
            places = None
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "_extra_state"}
            values = None if own else values
        elif own and self._held is not None:
            state_dict, values = {**state_dict, prefix + "values": self._held}, self._held
        whole = values is None or places is not None or self._awaits_values  # values are never taken for other places
        old, remap = dict(self.named_parameters(recurse=False)), None
        try:
            if places is not None:
                remap = self._take_places(places, self._held if values is None else values)
            elif values is not None and not whole:
                self._hold(values, prefix)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        if not whole:
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "values"}
        self._taken = places
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._taken = None
        if not whole:
            missing_keys[:] = [key for key in missing_keys if key != prefix + "values"]
        elif values is not None:
            self._awaits_values, self._paired = False, ref(self.values)
        if remap is not None:
            self._told(old, remap)
        if whole and places is not None:
            self.kinship.loaded(self)

    def _take_places(self, places: Any, values: Tensor | None) -> Remap | None:
        """Move to the places of a state dict, with its values or (None) by place with those there are.

        Returns:
            What is to be told, where values are still to be loaded.

        Raises:
            ValueError: they are not places of this layer, or do not fit the values; nothing was changed.
        """
        # a dict is how versions before 0.1 kept it
        topology = Topology.from_state_dict(places) if isinstance(places, dict) else from_tensor(_tensor(places))
        if topology.shape != self.topology.shape:
            raise ValueError(
                f"a layer of shape {topology.shape} does not fit {self.topology.shape}: "
                "where neurons were removed in training, call resize_to(model, state) before"
            )
        if values is not None and values.shape != (topology.size,):
            raise ValueError(f"{tuple(values.shape)} values do not match {topology.size} places")
        told = None
        if topology != self.topology:
            topology = topology.to(self.topology.device)
            remap = Remap.between(self.topology, topology)
            if values is None:
                self.remap_(topology, remap)
            else:
                told = self._make_room(topology, replace(remap, loaded=True))
        self._awaits_values = values is None
        if values is not None and values is self._held:
            with torch.no_grad():
                self.values.copy_(values)
            self._held, self._awaits_values = None, False
        elif values is not None:
            self._held = None
        return told

    def _make_room(self, topology: Topology, remap: Remap) -> Remap:
        """Take other places; the values that belong to them are still to come, perhaps from this very memory."""
        self.check_remap(topology, remap)
        with torch.no_grad():
            if topology.size != self.weights:
                self.values = carried(self.values, remap.apply(self.values), remap)
            elif self.values.grad is not None:
                self.values.grad = remap.apply(self.values.grad)
        self.topology = topology
        return remap

    def _hold(self, values: Tensor, prefix: str) -> None:
        """Keep values that came without their places until these come too."""
        self._held, self.doubtful = values.detach(), True
        warnings.warn(
            f"{prefix}values came without {prefix}_extra_state, their places: nothing was loaded from them, and the layer cannot "
            "be used until the places are loaded too. To set the numbers at the places that are: layer.values.copy_(...)",
            stacklevel=2,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.topology = self.topology.to(self.values.device)
        if self.kinship.written is not None:
            self.kinship.loaded(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: remap hooks and the watch stay with the original."""
        kept = {
            "_remap_checks": OrderedDict(),
            "_remap_hooks": OrderedDict(),
            "watch": None,
            "kinship": None,
            "_given": None,
            "_paired": None,
        }
        return {**self.__dict__, **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        fresh = {"kinship": Kinship(), "_given": Given()}
        super().__setstate__(
            {"doubtful": False, "_held": None, "_awaits_values": False, "_taken": None, **state, **fresh}
        )
        self._paired = ref(self.values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy, which is known of as long as its numbers may be updated from this layer's (see `layers.copies`)."""
        if self.doubtful:
            self.check_doubts()
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self.kinship.copied(self, new)
        return new


def _tensor(places: Any) -> Tensor:
    if not isinstance(places, Tensor):
        raise ValueError(f"not a topology: expected the tensor that a sparse layer gave, got {places!r:.200}")
    return places


class _Parametrizations(nn.ModuleDict):
    """A dictionary of modules one of which may be called like its method ``values``."""

    def add_module(self, name: str, module: Any) -> None:
        self._modules[name] = module


def _same_memory(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and not a.is_meta and a.shape == b.shape and a.data_ptr() == b.data_ptr()


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
