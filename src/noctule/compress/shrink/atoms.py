"""Which lines of which tensors go together: a union of sets of numbered lines.

A line is one index of one dimension of a parameter, such as a row of a weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noctule.sparse.layers import SparseLayer

FIXED = 0
"""The label of what cannot go, such as a feature of the model's input."""


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer in the graph, as itself."""

    name: str
    tensor: Tensor
    layer: SparseLayer | None = None
    """The sparse layer whose values these are: dimension 0 are its rows, 1 what its columns belong to."""


Value = Any
"""Labels (a tensor), a `Weight`, None for what belongs to no line, a tuple of such, or a constant."""


class Lines:
    """Numbered lines, of which some are tied: they go together or not at all.

    Labels are tensors of such numbers in any shape; `FIXED` is one of them.
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64)
        self._used = 1
        self._starts: dict[tuple[str, int], tuple[int, int]] = {}
        self.reasons: dict[int, str] = {FIXED: "it is one with the model's input"}
        """Why a set of lines has to stay, by the number of the set."""
        self.inexact: dict[int, str] = {}
        """Which statistics change without a set of lines, by the number of the set."""

    def of(self, tensor: str, dimension: int, size: int) -> Tensor:
        """The lines (size,) of a dimension of a tensor, the same ones at each call."""
        if (tensor, dimension) not in self._starts:
            if self._used + size > self._parent.numel():
                self._parent = torch.cat([self._parent, torch.zeros(self._used + size, dtype=torch.int64)])
            new = torch.arange(self._used, self._used + size)
            self._parent[self._used : self._used + size] = new
            self._starts[tensor, dimension] = self._used, size
            self._used += size
        start, length = self._starts[tensor, dimension]
        assert length == size, f"{tensor} has {length} lines in dimension {dimension}, not {size}"
        return torch.arange(start, start + size)

    def size(self, tensor: str, dimension: int) -> int:
        """How many lines a dimension has that was asked for."""
        return self._starts[tensor, dimension][1]

    def sets(self, labels: Tensor) -> Tensor:
        """The number of the set that each line is in, in the same shape."""
        while True:
            above = self._parent[labels]
            if torch.equal(above, labels):
                return labels
            labels = above

    def tie(self, a: Tensor, b: Tensor, fixed: str = "") -> None:
        """Have lines at the same place of two tensors of labels, which broadcast, go together.

        Args:
            a: labels.
            b: others; what is tied to `FIXED` has to stay.
            fixed: why it has to, where that is not because of the input.
        """
        a, b = torch.broadcast_tensors(self.sets(a), self.sets(b))
        pairs = (a * self._used + b)[a != b].unique()  # one number a pair: unique is much slower on columns
        for one, other in (divmod(pair, self._used) for pair in pairs.tolist()):
            self._join(one, other, fixed)

    def fix(self, labels: Tensor, reason: str) -> None:
        """Note that lines have to stay, and why."""
        for number in self.sets(labels).unique().tolist():
            self.reasons.setdefault(number, reason)

    def note_inexact(self, labels: Tensor, what: str) -> None:
        """Note what changes for the others where lines go."""
        for number in self.sets(labels).unique().tolist():
            self.inexact.setdefault(number, what)

    def dimensions(self) -> Iterator[tuple[str, int, Tensor]]:
        """Each dimension asked for so far, with the set of each of its lines: (tensor, dimension, sets)."""
        for (tensor, dimension), (start, size) in self._starts.items():
            yield tensor, dimension, self.sets(torch.arange(start, start + size))

    def _join(self, one: int, other: int, fixed: str) -> None:
        one, other = sorted(self.sets(torch.tensor([one, other])).tolist())
        if one == other:
            return
        if one == FIXED:
            self.reasons.setdefault(other, fixed or self.reasons[FIXED])
            return
        self._parent[other] = one
        for notes in (self.reasons, self.inexact):
            if other in notes:
                notes.setdefault(one, notes.pop(other))


def varies(labels: Tensor, dimension: int) -> bool:
    """Whether the label depends on the place in a dimension."""
    return labels.shape[dimension] > 1 and bool((labels.narrow(dimension, 0, 1) != labels).any())
