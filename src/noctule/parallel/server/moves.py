"""How the connections of a sparse layer at a parameter server move, and the log of their last moves.

A gradient belongs to the connections that its worker had. The server moves it to the slots of the present ones, and leaves out what
belongs to a connection that was dropped. A connection that was dropped and grown again is another one.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from noctule.core.errors import ExchangeError
from noctule.core.remap import Remap, exchange
from noctule.core.topology import Topology

KEPT = 4
"""How many moves of a layer are kept: each takes 4 bytes a weight, and the move itself."""
UNKNOWN = -1
"""The version of a worker that has not received the server's topology yet."""


@dataclass(frozen=True)
class Move:
    """Connections that are dropped, and as many that are grown."""

    dropped: Tensor
    """The slots of the dropped connections, sorted."""
    grown: Tensor
    """The keys of the grown connections, sorted."""

    @classmethod
    def between(cls, old: Topology, new: Topology) -> Self:
        """The move from one topology to another.

        >>> from noctule.core.topology import Topology
        >>> a, b = (Topology.from_keys((1, 9), torch.tensor(keys)) for keys in ([0, 2, 5], [0, 5, 7]))
        >>> Move.between(a, b)
        Move(dropped=tensor([1]), grown=tensor([7]))
        """
        return cls.along(Remap.between(old, new), new)

    @classmethod
    def along(cls, remap: Remap, new: Topology) -> Self:
        """The move that a remap to a topology made."""
        old_slot = remap.old_slot
        goes = torch.ones(remap.old_size, dtype=torch.bool)
        goes[old_slot[old_slot >= 0].cpu()] = False
        return cls(goes.nonzero()[:, 0], new.keys()[old_slot < 0].cpu())

    def of(self, topology: Topology) -> tuple[Topology, Remap]:
        """Apply the move to a topology.

        Raises:
            ExchangeError: it does not fit this topology.
        """
        if self.dropped.numel() != self.grown.numel():
            raise ExchangeError(
                f"{self.dropped.numel()} connections are dropped and {self.grown.numel()} grown: it must be as many"
            )
        new, remap = exchange(topology, self.dropped.to(topology.device), self.grown.to(topology.device))
        keys = new.keys()
        if bool((keys[1:] <= keys[:-1]).any()):
            raise ExchangeError("a connection that is to be grown is there already")
        return new, remap

    def write(self, topology: Topology) -> list[bytes]:
        """Make two frames, for `read`."""
        return [to_frame(self.dropped, topology.size), to_frame(self.grown, topology.places)]

    @classmethod
    def read(cls, frames: list[bytes], topology: Topology) -> Self:
        """Read a move of a layer with this many weights and places.

        Raises:
            ExchangeError: the frames do not hold one.
        """
        return cls(from_frame(frames[0], topology.size), from_frame(frames[1], topology.places))


class TopologyLog:
    """The topology of one layer at the server, its version, and the last moves that led to it."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.version = topology, 0
        self._last: deque[tuple[Move, Remap]] = deque(maxlen=KEPT)

    def note(self, move: Move, topology: Topology, remap: Remap) -> None:
        """Add a move, which makes the next version."""
        self.topology, self.version = topology, self.version + 1
        self._last.append((move, Remap(remap.old_slot.to(torch.int32), remap.old_size)))

    def remapped(self, gradient: Tensor, version: int) -> Tensor | None:
        """A gradient (N,) of a version, moved to the present slots; None if that version is no longer in the log."""
        missed = self._since(version)
        if missed is None:
            return None
        for _, remap in missed:
            gradient = remap.apply(gradient)
        return gradient

    def missed(self, version: int) -> list[Move] | None:
        """The moves since a version; None if that version is no longer in the log."""
        missed = self._since(version)
        return None if missed is None else [move for move, _ in missed]

    def state_dict(self) -> dict[str, Any]:
        """All of the state, as plain data."""
        last = [{"dropped": m.dropped, "grown": m.grown, "old_slot": r.old_slot} for m, r in self._last]
        return {"topology": self.topology.state_dict(), "version": self.version, "last": last}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Make a log from a state."""
        made = cls(Topology.from_state_dict(state["topology"]))
        made.version = state["version"]
        for step in state["last"]:
            made._last.append((Move(step["dropped"], step["grown"]), Remap(step["old_slot"], step["old_slot"].numel())))
        return made

    def _since(self, version: int) -> list[tuple[Move, Remap]] | None:
        if version > self.version:
            raise ExchangeError(
                f"a worker has seen version {version} of a layer's connections, and this server is at {self.version}: its newest "
                "snapshot is lost or damaged. Begin again from what the workers have"
            )
        behind = self.version - version
        return list(self._last)[len(self._last) - behind :] if version >= 0 and behind <= len(self._last) else None


def to_frame(numbers: Tensor, below: int) -> bytes:
    """Make a frame of sorted whole numbers, all less than ``below``."""
    return numbers.cpu().to(_dtype(below)).numpy().tobytes()


def from_frame(frame: bytes, below: int) -> Tensor:
    """Read sorted whole numbers (int64) from a frame.

    Raises:
        ExchangeError: the frame holds something else.
    """
    dtype = _dtype(below)
    if len(frame) % dtype.itemsize:
        raise ExchangeError(f"a frame of {len(frame)} bytes is no list of slots or keys: it is torn")
    numbers = torch.frombuffer(bytearray(frame), dtype=dtype).to(torch.int64) if frame else torch.empty(0).long()
    if numbers.numel() and (int(numbers[0]) < 0 or int(numbers[-1]) >= below or bool((numbers.diff() <= 0).any())):
        raise ExchangeError(f"slots and keys must be sorted, each once, and below {below}, and are not")
    return numbers


def _dtype(below: int) -> torch.dtype:
    return torch.int32 if below <= 2**31 else torch.int64
