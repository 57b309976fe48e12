"""What happened to the slots of a weight when its places or its width changed, and the ways to change them.

Shapes: O out features (rows), I in features (columns), N stored weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from noctule.core.keys import in_order, merged, slots_of
from noctule.core.topology import Topology


@dataclass(frozen=True, eq=False)
class Remap:
    """Where each new slot of a weight comes from: its old slot, or -1 for a new connection.

    Where the width changed too, ``rows`` and ``columns`` are the same for what has one number for each row (a bias, a neuron's
    scale) or column.
    """

    old_slot: Tensor
    old_size: int
    rows: "Remap | None" = None
    """Where each new row comes from; None: the rows are what they were."""
    columns: "Remap | None" = None
    parts: Mapping[str, "Remap"] = field(default_factory=dict)
    """What happened to each parameter by name, for a module that has no weight with rows and columns."""
    loaded: bool = False
    """Whether the new numbers come with the new places, from a state dict: what was loaded with them is of these places already."""

    @property
    def new_size(self) -> int:
        """Slots after the change."""
        return self.old_slot.numel()

    @property
    def grown(self) -> int:
        """Connections that are new."""
        return int((self.old_slot < 0).sum())

    def apply(self, x: Tensor, new: float | Tensor = 0.0) -> Tensor:
        """``x`` (N_old,) carried to the new slots (N_new,); new connections get ``new``, a number or a (N_new,) tensor."""
        if x.shape != (self.old_size,):
            raise ValueError(
                f"expected one number for each of the {self.old_size} old slots, got shape {tuple(x.shape)}"
            )
        old_slot = self.old_slot.to(x.device)
        moved = x.index_select(0, old_slot.clamp(min=0)) if self.old_size else x.new_zeros(self.new_size)
        return torch.where(old_slot < 0, torch.as_tensor(new, dtype=x.dtype, device=x.device), moved)

    def stays(self) -> "Remap":
        """The same change to one that keeps numbers of the new places already: each stays in its slot."""
        return Remap(torch.arange(self.new_size, device=self.old_slot.device), self.new_size)

    def of(self, name: str) -> "Remap | None":
        """What happened to a layer's parameter of this name: this to its weight, to the bias what happened to the rows."""
        return {"values": self, "weight": self, "bias": self.rows, **self.parts}.get(name)

    def resized(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape, after the change, of a weight that had this one before.

        Raises:
            ValueError: the rows or columns are those of another shape.
        """
        (rows, height), (columns, width) = (
            (size, size) if lines is None else (lines.old_size, lines.new_size)
            for lines, size in zip((self.rows, self.columns), shape, strict=True)
        )
        if (rows, columns) != tuple(shape):
            raise ValueError(f"this remap is of {rows} rows and {columns} columns, the weight has the shape {shape}")
        return height, width

    @classmethod
    def between(cls, old: Topology, new: Topology) -> Self:
        """From the places of one topology to those of another of the same shape."""
        if old.shape != new.shape:
            raise ValueError(f"topologies of shapes {old.shape} and {new.shape} share no places: use resize")
        return cls(slots_of(old.keys(), new.keys()), old.size)


def exchange(topology: Topology, dropped: Tensor, grown: Tensor) -> tuple[Topology, Remap]:
    """Without the ``dropped`` slots and with the ``grown`` keys, none of which may be there yet.

    >>> t = Topology.from_places((1, 4), torch.tensor([0, 0]), torch.tensor([0, 2]))
    >>> new, remap = exchange(t, torch.tensor([0]), torch.tensor([3]))
    >>> new.columns.tolist(), remap.old_slot.tolist()
    ([2, 3], [1, -1])
    """
    stays = torch.ones(topology.size, dtype=torch.bool, device=topology.device)
    stays[dropped] = False
    slots = stays.nonzero()[:, 0]
    kept, grown = topology.keys().index_select(0, slots), in_order(grown)
    keys, new = merged(kept, grown)
    old = torch.ones_like(keys, dtype=torch.bool)
    old[new] = False
    old_slot = torch.full_like(keys, -1).masked_scatter_(old, slots)
    return Topology.from_keys(topology.shape, keys), Remap(old_slot, topology.size)


def resize(topology: Topology, *, rows: Tensor | None = None, columns: Tensor | None = None) -> tuple[Topology, Remap]:
    """A topology of another width: for each new row and column the old one it continues, or -1 for an empty new one.

    >>> t = Topology.from_places((2, 2), torch.tensor([0, 1]), torch.tensor([0, 1]))
    >>> smaller, remap = resize(t, rows=torch.tensor([1]))
    >>> smaller.shape, remap.old_slot.tolist(), remap.rows.old_slot.tolist(), remap.columns
    ((1, 2), [1], [1], None)
    """
    row_remap, column_remap = _lines(rows, topology.shape[0]), _lines(columns, topology.shape[1])

    def moved(at: Tensor, remap: Remap | None) -> Tensor:
        """The new row or column of each place, or -1."""
        if remap is None:
            return at
        continued = (remap.old_slot >= 0).nonzero()[:, 0]
        new = torch.full((remap.old_size,), -1, dtype=torch.int64, device="cpu")
        new[remap.old_slot[continued]] = continued
        return new[at]

    r, c = moved(topology.rows().cpu(), row_remap), moved(topology.columns.to(torch.int64).cpu(), column_remap)
    stays = ((r >= 0) & (c >= 0)).nonzero()[:, 0]
    width = topology.shape[1] if column_remap is None else column_remap.new_size
    keys, order = (r[stays] * width + c[stays]).sort()
    device = topology.device
    remap = Remap(stays[order].to(device), topology.size, row_remap, column_remap)
    return Topology.from_keys(remap.resized(topology.shape), keys.to(device)), remap


def resize_full(shape: tuple[int, int], *, rows: Tensor | None = None, columns: Tensor | None = None) -> Remap:
    """The same of a weight that stores all its places, row by row, as a dense layer does; new rows and columns are full.

    >>> resize_full((2, 3), columns=torch.tensor([0, 2])).old_slot.tolist()
    [0, 2, 3, 5]
    """
    row_remap, column_remap = _lines(rows, shape[0]), _lines(columns, shape[1])
    r, c = (
        torch.arange(size, device="cpu") if remap is None else remap.old_slot
        for remap, size in ((row_remap, shape[0]), (column_remap, shape[1]))
    )
    slots = torch.where((r[:, None] < 0) | (c < 0), -1, r[:, None] * shape[1] + c)
    return Remap(slots.flatten(), shape[0] * shape[1], row_remap, column_remap)


def cut(shape: Sequence[int], kept: Mapping[int, Tensor]) -> Remap:
    """What happens to the numbers of a tensor of any shape of which only some lines of some dimensions stay.

    >>> cut((2, 3), {1: torch.tensor([0, 2])}).old_slot.tolist()
    [0, 2, 3, 5]
    """
    slots = torch.arange(math.prod(shape), device="cpu").view(tuple(shape))
    for dimension, lines in kept.items():
        slots = slots.index_select(dimension, lines.cpu())
    return Remap(slots.flatten(), math.prod(shape))


def merge(topologies: Sequence[Topology], values: Sequence[Tensor]) -> tuple[Topology, Tensor]:
    """The union of several workers' places; each value is the mean over the workers that hold the place."""
    shapes = {t.shape for t in topologies}
    if len(shapes) != 1 or len(topologies) != len(values):
        raise ValueError(
            f"merge needs topologies of one shape and one list of values for each, got shapes {sorted(shapes)}"
        )
    for topology, v in zip(topologies, values, strict=True):
        if v.shape != (topology.size,):
            raise ValueError(f"{tuple(v.shape)} values do not match {topology.size} places")
    keys, slot = torch.cat([t.keys() for t in topologies]).unique(return_inverse=True)
    total = torch.zeros(keys.numel(), dtype=values[0].dtype, device=keys.device).index_add_(
        0, slot, torch.cat(list(values))
    )
    return Topology.from_keys(topologies[0].shape, keys), total / torch.bincount(slot, minlength=keys.numel())


def carried(old: nn.Parameter, moved: Tensor, remap: Remap) -> nn.Parameter:
    """The parameter with these numbers: the same object where the shape stays, else a new one; its gradient moves too."""
    gradient = None if old.grad is None else remap.apply(old.grad.flatten()).view(moved.shape)
    new = old if moved.shape == old.shape else nn.Parameter(moved, requires_grad=old.requires_grad)
    new.copy_(moved)
    new.grad = gradient
    return new


def _lines(kept: Tensor | None, size: int) -> Remap | None:
    """What becomes of ``size`` rows or columns of which these are kept."""
    if kept is None:
        return None
    kept = kept.to(torch.int64).cpu()
    old = kept[kept >= 0]
    if old.numel() and (int(old.max()) >= size or old.unique().numel() != old.numel()):
        raise ValueError(f"old rows and columns must be below {size} and each used once, got {kept.tolist()!r:.200}")
    return Remap(kept.clamp(min=-1), size)
