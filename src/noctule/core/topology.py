"""Which places of a weight exist.

Shapes: O out features (rows), I in features (columns), N stored weights.
"""

import itertools
import operator
from typing import Any, NamedTuple, Protocol, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from noctule.core.keys import counts_up_to, distinct, in_order

MOST_FEATURES = 2**31 - 1
_WHOLE = (torch.uint16, torch.int32, torch.int64)

_serial = itertools.count()
_alive: WeakValueDictionary[int, "Topology"] = WeakValueDictionary()


class Transposed(NamedTuple):
    """The same places read column by column: for each, its row and the slot of its value."""

    row_ptr: Tensor
    columns: Tensor
    slots: Tensor
    sources: int
    """How many columns there are."""


class Places(Protocol):
    """What a product is taken over: rows of a matrix, each with the columns it holds; place k has value k.

    It has ``shape``, ``row_ptr`` and ``columns`` like a `Topology`, which is one; a convolution's shifted rows of an image are
    another.
    """

    shape: tuple[int, int]
    row_ptr: Tensor
    columns: Tensor
    size: int

    @property
    def transposed(self) -> Transposed:
        """The same places, for the way back."""
        ...


class Topology:
    """The sorted, unique places of a sparse (O, I) weight; place k holds value k.

    It never changes: a layer that rewires gets a new one. ``row_ptr`` (O + 1) is int32 where N allows, ``columns`` (N)
    uint16 or int32. Its ``handle`` is a 0-d tensor that names it inside compiled graphs (see `named`).

    >>> t = Topology.from_places((2, 3), torch.tensor([1, 0, 1]), torch.tensor([2, 1, 0]))
    >>> t.size, t.rows().tolist(), t.columns.tolist()
    (3, [0, 1, 1], [1, 0, 2])
    """

    def __init__(self, shape: tuple[int, int], row_ptr: Tensor, columns: Tensor) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self.row_ptr = row_ptr
        self.columns = columns
        self.size = columns.numel()
        self._transposed: Transposed | None = None
        self.derived: dict[Any, Any] = {}
        """Indices made of these places that live as long as they do, each with ``nbytes``."""
        serial = next(_serial)
        self.handle = torch.tensor(serial, device="cpu")
        _alive[serial] = self

    # -- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def from_keys(cls, shape: tuple[int, int], keys: Tensor) -> Self:
        """Places from their sorted, unique keys ``row * I + column`` (N,), int64."""
        out_features, in_features = _checked_shape(shape)
        rows = torch.div(keys, max(in_features, 1), rounding_mode="floor")
        counts = torch.bincount(rows, minlength=out_features)
        row_ptr = torch.zeros(out_features + 1, dtype=_pointer_dtype(keys.numel()), device=keys.device)
        row_ptr[1:] = counts.cumsum(0)
        columns = (keys - rows * in_features).to(column_dtype(in_features))
        return cls((out_features, in_features), row_ptr, columns)

    @classmethod
    def from_places(cls, shape: tuple[int, int], rows: Tensor, columns: Tensor) -> Self:
        """Places in any order, each once.

        Raises:
            ValueError: a place lies outside the shape or appears twice.
        """
        out_features, in_features = _checked_shape(shape)
        rows, columns = rows.to(torch.int64), columns.to(torch.int64)
        if rows.shape != columns.shape or rows.dim() != 1:
            raise ValueError(
                f"rows {tuple(rows.shape)} and columns {tuple(columns.shape)} must be two equal lists of places"
            )
        for name, index, size in (("row", rows, out_features), ("column", columns, in_features)):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(f"{name}s must lie in [0, {size}), got {int(index.min())} to {int(index.max())}")
        keys = in_order(rows * in_features + columns)
        if (keys[1:] == keys[:-1]).any():
            raise ValueError("a place appears twice: give each (row, column) once")
        return cls.from_keys((out_features, in_features), keys)

    @classmethod
    def random(cls, shape: tuple[int, int], weights: int, *, generator: torch.Generator | None = None) -> Self:
        """``weights`` places drawn uniformly without repetition, in time and memory O(weights), on the CPU."""
        out_features, in_features = _checked_shape(shape)
        places = out_features * in_features
        check_weights(weights, shape)
        return cls.from_keys(shape, distinct(weights, places, generator))

    # -- reading it -----------------------------------------------------------------------------------------------

    @property
    def places(self) -> int:
        """How many weights a dense layer of this shape has."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """Stored weights over places (1.0 for an empty shape)."""
        return self.size / self.places if self.places else 1.0

    @property
    def device(self) -> torch.device:
        """Where the indices are."""
        return self.columns.device

    @property
    def nbytes(self) -> int:
        """Bytes of all index arrays, derived ones included where they exist."""
        arrays = (self.row_ptr, self.columns, *(self._transposed or ())[:3], *self.derived.values())
        return sum(array.nbytes for array in arrays)

    def rows(self) -> Tensor:
        """The row of each place (N,), int64."""
        counts = self.row_ptr.diff().to(torch.int64)
        return torch.arange(self.shape[0], device=self.device).repeat_interleave(counts, output_size=self.size)

    def keys(self) -> Tensor:
        """``row * I + column`` of each place (N,), int64, sorted."""
        return self.rows().mul_(self.shape[1]).add_(self.columns.to(torch.int64))

    @property
    def transposed(self) -> Transposed:
        """The index of the transpose, built on first use and kept."""
        if self._transposed is None:
            row_ptr = torch.zeros(self.shape[1] + 1, dtype=self.row_ptr.dtype, device=self.device)
            row_ptr[1:] = torch.bincount(self.columns.to(torch.int32), minlength=self.shape[1]).cumsum(0)
            slots = self._by_column()
            rows = self.rows().to(torch.int32).index_select(0, slots).to(column_dtype(self.shape[0]))
            self._transposed = Transposed(row_ptr, rows, slots, self.shape[0])
        return self._transposed

    def _by_column(self) -> Tensor:
        """The slots in the order of their columns."""
        if self.row_ptr.dtype is torch.int64:
            return torch.argsort(self.columns.to(torch.int64), stable=True)
        both = self.columns.to(torch.int64) << 32  # the slot goes with its column, so that a sort of numbers is enough
        both |= torch.arange(self.size, device=self.device)
        return in_order(both).to(torch.int32)  # the lower half

    def missing(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Keys (sorted) of ``count`` places that are not here, drawn uniformly; fewer where fewer are missing."""
        keys, absent = self.keys().cpu(), self.places - self.size
        ranks = distinct(min(count, absent), absent, generator)
        # keys[k] - k places are missing before the k-th stored one, so rank r lies behind all that have at most r before them
        before = keys - torch.arange(self.size, device="cpu")
        return ranks + counts_up_to(before, ranks)

    def to(self, device: torch.device | str) -> "Topology":
        """This topology on another device; on ``meta`` it stays where it is, since places cannot be made up later."""
        device = torch.device(device)
        if device in (self.device, torch.device("meta")):
            return self
        return Topology(self.shape, self.row_ptr.to(device), self.columns.to(device))

    def __eq__(self, other: object) -> bool:
        """Same shape and same places."""
        if not isinstance(other, Topology):
            return NotImplemented
        return self is other or (
            self.shape == other.shape
            and self.size == other.size
            and torch.equal(self.row_ptr.cpu().long(), other.row_ptr.cpu().long())
            and torch.equal(self.columns.cpu().long(), other.columns.cpu().long())
        )

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> "Topology":
        """Itself: it never changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew from its keys, so that its handle is its own (and since plain pickle does not know uint16)."""
        return Topology.from_keys, (self.shape, self.keys())

    def __repr__(self) -> str:
        """Shape, weights and density."""
        return f"Topology(shape={self.shape}, size={self.size}, density={self.density:.4g})"

    # -- keeping it -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The places as tensors, for a checkpoint."""
        return {"shape": list(self.shape), "row_ptr": self.row_ptr, "columns": self.columns}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The inverse of `state_dict`; what is given is not trusted.

        Raises:
            ValueError: the arrays are not the sorted, unique places of a matrix of that shape.
        """
        try:
            shape = (operator.index(state["shape"][0]), operator.index(state["shape"][1]))
            row_ptr, columns = _listed(state["row_ptr"]), _listed(state["columns"])
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a topology: expected shape, row_ptr and columns, got {state!r:.200}") from error
        _checked_shape(shape)
        n = columns.numel()
        if (
            row_ptr.numel() != shape[0] + 1
            or int(row_ptr[0]) != 0
            or int(row_ptr[-1]) != n
            or (row_ptr.diff() < 0).any()
        ):
            raise ValueError(f"not a topology: the row pointers do not cut {n} places into {shape[0]} rows")
        rows = torch.arange(shape[0], device=columns.device).repeat_interleave(row_ptr.diff())
        return cls.from_places(shape, rows, columns)


def named(handle: Tensor) -> Topology:
    """The living topology with this handle."""
    return _alive[int(handle)]


def check_weights(weights: int, shape: tuple[int, int]) -> None:
    """Refuse a number of weights that does not fit the shape."""
    if not 0 <= weights <= shape[0] * shape[1]:
        raise ValueError(f"{weights} weights do not fit into {shape[0]} x {shape[1]} = {shape[0] * shape[1]} places")


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    out_features, in_features = int(shape[0]), int(shape[1])
    if not (0 <= out_features <= MOST_FEATURES and 0 <= in_features <= MOST_FEATURES):
        raise ValueError(f"features must lie between 0 and {MOST_FEATURES}, got {out_features} x {in_features}")
    return out_features, in_features


def _pointer_dtype(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64


def column_dtype(features: int) -> torch.dtype:
    """The smallest type that holds the index of a column."""
    return torch.uint16 if features <= 2**16 else torch.int32


def _listed(x: Any) -> Tensor:
    """A list of whole numbers as int64."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.dim() != 1 or x.dtype not in _WHOLE:
        raise TypeError("not a list of whole numbers")
    return x.to(torch.int64)
