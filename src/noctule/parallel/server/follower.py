"""A worker's side of moving connections: its sparse layers have the places that the server says, or say to it what moved."""

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


class Followed:
    """The sparse layers that are trained, by the names of their values.

    Args:
        model: where they are.
        carry: is called with a name and what happened to its slots, whoever moved them, until `close`.
    """

    def __init__(self, model: nn.Module, carry: Callable[[str, Remap], None]) -> None:
        """Look at the layers as they are; the server's places are not known yet."""
        self.layers: dict[str, Any] = {
            f"{prefix}.values" if prefix else "values": layer
            for prefix, layer in sparse_layers(model).items()
            if layer.values.requires_grad
        }
        self.places: dict[str, Topology] = {name: layer.topology for name, layer in self.layers.items()}
        """Where the server and this worker agree."""
        self._versions = dict.fromkeys(self.layers, UNKNOWN)
        self._now = dict(self.places)
        self._moved: dict[str, tuple[Topology, Remap]] = {}  # from the places agreed on to these, in one go
        self._undo = ExitStack()
        for name, layer in self.layers.items():
            self._undo.callback(layer.register_remap_check(partial(_check, name)).remove)
            self._undo.callback(layer.register_remap_hook(partial(self._note, carry, name)).remove)

    def facts(self) -> dict[str, str]:
        """What all workers must have alike; places they are told."""
        return {f"{name}'s matrix": str(topology.shape) for name, topology in self.places.items()}

    def versions(self, names: Iterable[str]) -> dict[str, int]:
        """Of the places that this worker has."""
        return {name: self._versions[name] for name in names if name in self.layers}

    def seed(self, names: Iterable[str]) -> tuple[dict[str, list[int]], list[bytes]]:
        """The shapes and the first places."""
        mine = [name for name in names if name in self.layers]
        places = {name: self.layers[name].topology for name in mine}
        frames = [to_frame(topology.keys(), topology.places) for topology in places.values()]
        return {name: list(topology.shape) for name, topology in places.items()}, frames

    def elsewhere(self) -> list[str]:
        """The layers whose places are not those agreed on."""
        return [
            name
            for name, layer in self.layers.items()
            if layer.topology is not self.places[name] and layer.topology != self.places[name]
        ]

    def tell(self, moved: Sequence[str], dealt: Sequence[Sequence[str]]) -> list[tuple[dict[str, Any], list[bytes]]]:
        """For each shard what has moved here in these layers, and the first values of what has come; from now on that is agreed."""
        messages = []
        for names in dealt:
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

    def go_back(self) -> None:
        """To the places agreed on, as after a checkpoint of other ones was loaded."""
        for name in self.elsewhere():
            layer, topology = self.layers[name], self.places[name]
            layer.remap_(topology, Remap.between(layer.topology, topology))

    def take(self, header: Mapping[str, Any], frames: Sequence[bytes]) -> None:
        """Move to the places that an answer of the server says; values are to come.

        Raises:
            ExchangeError: it does not say that.
        """
        rest = list(frames)
        for name, version, moves in map(self._entry, field(header, "places", list, default=[])):
            layer = self.layers[name]
            if len(rest) < (1 if moves is None else 2 * moves):
                raise ExchangeError(f"of the connections of {name!r} only a part came: the answer is torn")
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
        """A remap hook."""
        before, self._now[name] = self._now[name], layer.topology
        self._moved.pop(name, None)
        if before is self.places[name]:
            self._moved[name] = layer.topology, remap
        carry(name, remap)

    def _entry(self, entry: Any) -> tuple[str, int, int | None]:
        """The name of a layer, the version of its places, and how many moves lead to it; None for all of them anew."""
        if isinstance(entry, list) and len(entry) == 3:
            name, version, moves = entry
            counted = type(version) is int and (moves is None or type(moves) is int)
            if isinstance(name, str) and name in self.layers and counted:
                return name, version, moves
        raise ExchangeError(f"the server says of its connections {entry!r:.200}, which cannot be")

    def close(self) -> None:
        """Stop listening."""
        self._undo.close()


def _check(name: str, layer: nn.Module, remap: Remap) -> None:
    """Refuse, before anything moved, what the server cannot follow."""
    if remap.new_size != remap.old_size or remap.rows is not None or remap.columns is not None:
        raise ValueError(
            f"{name!r} is to go from {remap.old_size} to {remap.new_size} weights, or to another width, and the parameter server "
            "keeps as many as it was given: connections may move (set_, rigl, gse), but leave methods that remove weights or "
            "neurons out of this session, or train with EverySync or DiLoCo, which follow"
        )
