"""The loading of a sparse layer: its places and its values, which a tool may bring together or one after the other.

Numbers are never paired with other places. Together, the layer moves to the places, then torch copies the values. Places alone: the
layer moves, the values that it has follow by place, and the values that come next are of these places. Values alone: they are kept
aside, and the layer cannot be used until their places come too.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from noctule.core.remap import Remap, carried
from noctule.core.topology import Topology
from noctule.sparse.layers.places import Given, from_tensor


@dataclass(frozen=True)
class Load:
    """One `load_state_dict` of a layer, after its places were taken and before torch copies the rest."""

    state_dict: Mapping[str, Any]
    """What torch is to load."""
    old: dict[str, nn.Parameter]
    """The layer's parameters before."""
    remap: Remap | None
    """The change of places that the layer's hooks are still to be called for."""
    places: bool
    """Whether the state dict has places."""
    values: bool
    """Whether it has values that are loaded."""
    kept_aside: str | None
    """The name of values that are not loaded, since their places are not known."""


class Loading:
    """The places and values that were loaded into a layer without each other, and the places it gave to state dicts."""

    def __init__(self) -> None:
        self.unplaced: Tensor | None = None
        """Values that were loaded without their places; the layer does not have them yet."""
        self.awaits_values = False
        """Whether places were loaded without values, so that the values that come next are of these places."""
        self.given = Given()
        self.taken: Any = None
        """The places that were taken last: torch passes the same object to `set_extra_state`, which then has nothing to do."""
        self._paired: Any = None

    def pair(self, values: Tensor) -> None:
        """Note that these values are of the layer's places; others that are set as an attribute are not known to be."""
        self._paired = ref(values)

    def moved(self, layer: Any) -> None:
        """The layer has other places now, with its own values."""
        self.awaits_values = False
        self.pair(layer.values)
        self.given.moved(layer.topology)

    def check(self, layer: Any) -> bool:
        """Raise RuntimeError where values wait for their places; else whether state dicts of the layer are still around."""
        if self.unplaced is not None:
            raise RuntimeError(
                f"{self.unplaced.numel()} values of a {type(layer).__name__} were loaded without their places, and wait for them: "
                "load '_extra_state' of the same state dict too"
            )
        return self.given.check(layer.topology)

    def begin(self, layer: Any, state_dict: Mapping[str, Any], prefix: str) -> Load:
        """Take the places of a state dict; its values are left to torch.

        Raises:
            ValueError: they are not places of this layer, or do not fit the values; nothing was changed.
        """
        places, values = state_dict.get(prefix + "_extra_state"), state_dict.get(prefix + "values")
        own = values is not None and _same_memory(values, layer.values)
        if type(places).__name__ == "_EXTRA_STATE":  # from torch's set_model_state_dict, for what a shard does not hold
            places, values = None, None if own else values
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "_extra_state"}
        elif own and self.unplaced is not None:
            values = self.unplaced
            state_dict = {**state_dict, prefix + "values": values}
        old, remap, kept_aside = dict(layer.named_parameters(recurse=False)), None, None
        if places is not None:
            remap = self._move(layer, places, self.unplaced if values is None else values)
        elif values is not None and not self.awaits_values:  # values are never taken for other places
            self._keep_aside(layer, values, prefix)
            kept_aside, values = prefix + "values", None
            state_dict = {key: value for key, value in state_dict.items() if key != kept_aside}
        self.taken = places
        return Load(state_dict, old, remap, places is not None, values is not None, kept_aside)

    def end(self, layer: Any, load: Load) -> None:
        """Torch has loaded the rest."""
        self.taken = None
        if load.values:
            self.awaits_values = False
            self.pair(layer.values)
        if load.remap is not None:
            layer._has_moved(load.old, load.remap)
        if load.places:
            layer.kinship.loaded(layer)

    def take(self, layer: Any, places: Any) -> None:
        """Move to places that come without values, by a tool that loads piece by piece."""
        if places is self.taken:
            return
        old, replaced = dict(layer.named_parameters(recurse=False)), self._paired() is not layer.values
        remap = self._move(layer, places, layer.values if replaced else None)  # values set before are of these places
        if remap is not None:
            layer._has_moved(old, remap)
        self.taken = places
        self.pair(layer.values)

    def complete(self) -> None:
        """Everything was loaded, by a tool that does not say so itself."""
        self.awaits_values, self.taken = False, None

    def _move(self, layer: Any, places: Any, values: Tensor | None) -> Remap | None:
        """Move to the places of a state dict, with its values or (None) by place with those there are.

        Returns:
            The change that the hooks are to be called for, where values are still to be loaded.
        """
        topology = _read(places)
        if topology.shape != layer.topology.shape:
            raise ValueError(
                f"a layer of shape {topology.shape} does not fit {layer.topology.shape}: "
                "where neurons were removed in training, call resize_to(model, state) before"
            )
        if values is not None and values.shape != (topology.size,):
            raise ValueError(f"{tuple(values.shape)} values do not match {topology.size} places")
        pending = None
        if topology != layer.topology:
            topology = topology.to(layer.topology.device)
            remap = Remap.between(layer.topology, topology)
            if values is None:
                layer.remap_(topology, remap)
            else:
                pending = replace(remap, loaded=True)
                _make_room(layer, topology, pending)
        self.awaits_values = values is None
        if values is not None and values is self.unplaced:
            with torch.no_grad():
                layer.values.copy_(values)
        if values is not None:
            self.unplaced = None
        return pending

    def _keep_aside(self, layer: Any, values: Tensor, prefix: str) -> None:
        self.unplaced, layer.unverified = values.detach(), True
        warnings.warn(
            f"{prefix}values came without {prefix}_extra_state, their places: nothing was loaded from them, and the layer cannot "
            "be used until the places are loaded too. To set the numbers at the places that are: layer.values.copy_(...)",
            stacklevel=2,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: references to other objects stay with the original."""
        return {"unplaced": self.unplaced, "awaits_values": self.awaits_values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.__dict__.update(state)


def _read(places: Any) -> Topology:
    if isinstance(places, dict):  # as versions before 0.1 kept them
        return Topology.from_state_dict(places)
    if not isinstance(places, Tensor):
        raise ValueError(f"not a topology: expected the tensor that a sparse layer gave, got {places!r:.200}")
    return from_tensor(places)


def _make_room(layer: Any, topology: Topology, remap: Remap) -> None:
    """Take other places; the values that belong to them are still to come, perhaps from this very memory."""
    layer.check_remap(topology, remap)
    with torch.no_grad():
        if topology.size != layer.weights:
            layer.values = carried(layer.values, remap.apply(layer.values), remap)
        elif layer.values.grad is not None:
            layer.values.grad = remap.apply(layer.values.grad)
    layer.topology = topology


def _same_memory(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and not a.is_meta and a.shape == b.shape and a.data_ptr() == b.data_ptr()
