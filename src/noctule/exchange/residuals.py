"""Residuals of an exchange that is no longer used, carried to the one that is used instead."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from noctule.core.remap import Remap


class Residuals:
    """Residuals by key: each is added to the next exchange of its key, and dropped once that has been delivered."""

    def __init__(self) -> None:
        self._owed: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}  # residuals in the exchange under way

    def __bool__(self) -> bool:
        return bool(self._owed or self._pending)

    def add(self, residuals: Mapping[str, Tensor]) -> None:
        """Add the residuals that an exchange has released."""
        for key, x in residuals.items():
            self._owed[key] = self._owed[key] + x.view_as(self._owed[key]) if key in self._owed else x

    def begin(self) -> None:
        """Begin another exchange; what was pending in one that failed, or whose step was skipped, is owed again."""
        self._owed |= self._pending
        self._pending = {}

    def corrected(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The tensors plus what is owed for their keys, which is pending until `delivered`."""
        self._pending |= {key: self._owed.pop(key) for key in keys if key in self._owed}
        return [
            x + self._pending[key].view_as(x).to(x) if key in self._pending else x
            for x, key in zip(tensors, keys, strict=True)
        ]

    def delivered(self) -> None:
        """Drop what was pending."""
        self._pending = {}

    def release(self) -> dict[str, Tensor]:
        """All residuals, for the caller to send."""
        self.begin()
        owed, self._owed = self._owed, {}
        return owed

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """Move the residual of this key."""
        for kept in (self._owed, self._pending):
            if key in kept:
                kept[key] = remap.apply(kept[key].flatten()).view(shape)

    def state_dict(self) -> dict[str, Tensor]:
        """All residuals; those pending count as owed."""
        return self._owed | self._pending

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self._owed, self._pending = dict(state), {}
