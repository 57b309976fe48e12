"""A worker's sparse layers beside the server's: moves of the server are applied here, and moves made here are reported to it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from noctule.core.errors import ExchangeError
from noctule.core.exact import Exact
from noctule.core.optim import sparse_layers
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.parallel.server.moves import UNKNOWN, Move, from_frame, to_frame
from noctule.transport.messages import field, to_bytes


class LayerMirror:
    """The trained sparse layers of a model, and the topologies on which the server and this worker agree.

    Args:
        model: the model with the layers; they are kept by the names of their values.
        carry: a hook, called with a name and a remap after every move, of the server's or made here, until `close`.
    """

    def __init__(self, model: nn.Module, carry: Callable[[str, Remap], None]) -> None:
        self.layers: dict[str, Any] = {
            f"{prefix}.values" if prefix else "values": layer
            for prefix, layer in sparse_layers(model).items()
            if layer.values.requires_grad
        }
        self.places: dict[str, Topology] = {name: layer.topology for name, layer in self.layers.items()}
        """The topology of each layer that the server knows too."""
        self._versions = dict.fromkeys(self.layers, UNKNOWN)
        self._now = dict(self.places)
        self._moved: dict[str, tuple[Topology, Remap]] = {}  # moved here: from the topology agreed on to this one
        self._undo = ExitStack()
        for name, layer in self.layers.items():
            self._undo.callback(layer.register_remap_check(partial(_check, name)).remove)
            self._undo.callback(layer.register_remap_hook(partial(self._note, carry, name)).remove)

    def facts(self) -> dict[str, str]:
        """What every worker must have alike; topologies come from the server."""
        return {f"{name}'s matrix": str(topology.shape) for name, topology in self.places.items()}

    def versions(self, names: Iterable[str]) -> dict[str, int]:
        """The version of the topology of each sparse layer among these parameters."""
        return {name: self._versions[name] for name in names if name in self.layers}

    def seed(self, names: Iterable[str]) -> tuple[dict[str, list[int]], list[bytes]]:
        """The matrix shapes and the frames of the initial topologies, of the sparse layers among these parameters."""
        mine = [name for name in names if name in self.layers]
        places = {name: self.layers[name].topology for name in mine}
        frames = [to_frame(topology.keys(), topology.places) for topology in places.values()]
        return {name: list(topology.shape) for name, topology in places.items()}, frames

    def moved(self) -> list[str]:
        """The layers that were moved here since the last report."""
        return [
            name
            for name, layer in self.layers.items()
            if layer.topology is not self.places[name] and layer.topology != self.places[name]
        ]

    def report(
        self, moved: Sequence[str], assigned: Sequence[Sequence[str]]
    ) -> list[tuple[dict[str, Any], list[bytes]]]:
        """Make the messages to the shards that report the moves of these layers; the new topologies count as agreed."""
        messages = []
        for names in assigned:
            mine = [name for name in names if name in moved]
            header, frames = {"names": mine, "versions": self.versions(names)}, []
            for name in mine:
                old, layer = self.places[name], self.layers[name]
                to, remap = self._moved.get(name, (None, None))
                if remap is None or to is not layer.topology:
                    remap = Remap.between(old, layer.topology)
                first = layer.values.detach().float()[remap.old_slot < 0]
                frames += [*Move.along(remap, layer.topology).write(old), to_bytes(Exact().encode(first))]
                self.places[name] = layer.topology
                self._versions[name] += 1
            messages.append((header, frames))
        return messages

    def undo(self) -> None:
        """Undo the moves made here, as those that loading a checkpoint made."""
        for name in self.moved():
            layer, topology = self.layers[name], self.places[name]
            layer.remap_(topology, Remap.between(layer.topology, topology))

    def follow(self, header: Mapping[str, Any], frames: Sequence[bytes]) -> None:
        """Move the layers to the topologies in a reply of the server; the caller writes the values.

        Raises:
            ExchangeError: the reply is not valid.
        """
        rest = list(frames)
        for name, version, moves in map(self._entry, field(header, "places", list, default=[])):
            layer = self.layers[name]
            if len(rest) < (1 if moves is None else 2 * moves):
                raise ExchangeError(f"of the connections of {name!r} only a part came: the answer is incomplete")
            if moves is None:
                keys = from_frame(rest.pop(0), layer.topology.places)
                topology = Topology.from_keys(layer.topology.shape, keys).to(layer.values.device)
                if topology.size != layer.weights:
                    raise ExchangeError(
                        f"{name!r} has {layer.weights} connections, and the server says {topology.size}"
                    )
                if topology != layer.topology:
                    layer.remap_(topology, Remap.between(layer.topology, topology))
            for _ in range(moves or 0):
                move = Move.read([rest.pop(0), rest.pop(0)], layer.topology)
                layer.remap_(*move.of(layer.topology))
            self.places[name], self._versions[name] = layer.topology, version
        if rest:
            raise ExchangeError(f"an answer came with {len(rest)} frames too many")

    def _note(self, carry: Callable[[str, Remap], None], name: str, layer: Any, old: Any, remap: Remap) -> None:
        """Note a move: a remap hook."""
        before, self._now[name] = self._now[name], layer.topology
        self._moved.pop(name, None)
        if before is self.places[name]:
            self._moved[name] = layer.topology, remap
        carry(name, remap)

    def _entry(self, entry: Any) -> tuple[str, int, int | None]:
        """Read a layer's name, its version and how many moves lead to it; None if the whole topology was sent."""
        if isinstance(entry, list) and len(entry) == 3:
            name, version, moves = entry
            counted = type(version) is int and (moves is None or type(moves) is int)
            if isinstance(name, str) and name in self.layers and counted:
                return name, version, moves
        raise ExchangeError(f"the server says of its connections {entry!r:.200}, which cannot be")

    def close(self) -> None:
        """Remove the hooks."""
        self._undo.close()


def _check(name: str, layer: nn.Module, remap: Remap) -> None:
    """Refuse a change that the server cannot follow, before it is made: a remap check."""
    if remap.new_size != remap.old_size or remap.rows is not None or remap.columns is not None:
        raise ValueError(
            f"{name!r} is to go from {remap.old_size} to {remap.new_size} weights, or to another width, and the parameter server "
            "keeps as many as it was given: connections may move (set_, rigl, gse), but leave methods that remove weights or "
            "neurons out of this session, or train with EverySync or DiLoCo, which follow"
        )
