"""An exchange in a process group that is formed anew when workers are lost or join."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor
from typing_extensions import override

from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Exchange, Wrapped
from noctule.core.remap import Remap


class Grouped(Protocol):
    """A member of a process group that may be formed anew."""

    member: int
    """The number of this worker, for good."""
    generation: int
    """The number of groups it has been in."""
    broken: bool
    """Whether the group is to be left."""

    def check(self, *, leave_for_new_group: bool) -> None:
        """Raise LostWorkerError if a worker is lost or, with ``leave_for_new_group``, if other workers wait for a new group."""
        ...


class Elastic(Wrapped):
    """An exchange that is made anew in every group; its state is restored with that of the training.

    Residuals belong to a worker: a worker that resumes from another's state owes nothing.

    Args:
        team: the member whose groups these are.
        make: makes the exchange in a new group.
        leave_for_new_group: raise LostWorkerError also while this group works, if another worker waits to join.
    """

    def __init__(self, team: Grouped, make: Callable[[], Exchange], *, leave_for_new_group: bool = True) -> None:
        self._team, self._make, self._leave_for_new_group = team, make, leave_for_new_group
        self._inner: Exchange | None = None
        self._generation = -1
        self._loaded: dict[str, Any] | None = None  # kept until there is a group
        self._finished = 0

    def forget(self) -> None:
        """Drop the exchange of the last group: as long as it is referenced, its connections stay open and the others wait."""
        self._inner = self._loaded = None

    @property
    @override
    def inner(self) -> Exchange:
        """The exchange in the present group."""
        if self._inner is None or self._generation != self._team.generation:
            self._inner, self._generation = self._make(), self._team.generation
            if self._loaded is not None:
                self._inner.load_state_dict(self._loaded["kept"])
                if self._loaded["member"] != self._team.member:
                    self._inner.release()
                self._loaded = None
        return self._inner

    @override
    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The aggregates; raises LostWorkerError if the group is to be left."""
        with self._noticing():
            totals = self.inner(tensors, keys)
        self._finished += 1
        return totals

    @override
    def share(self, message: bytes) -> list[bytes]:
        """The messages of all workers; raises LostWorkerError if the group is to be left."""
        with self._noticing():
            return self.inner.share(message)

    @override
    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        if self._inner is not None or self._loaded is not None:  # in a new group only some workers may move connections
            self.inner.remapped(key, remap, shape)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state of the exchange, and the worker that it is of; nothing before the first group."""
        if self._loaded is not None or self._inner is None:
            return self._loaded or {}
        return {"member": self._team.member, "finished": self._finished, "kept": self._inner.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, in the next group; without the residuals if it is another worker's."""
        self._inner, self._loaded, self._finished = None, state or None, int(state.get("finished", 0))

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            self._team.check(leave_for_new_group=self._leave_for_new_group)
            yield
        except LostWorkerError:
            self._team.broken = True
            raise

    @override
    def __repr__(self) -> str:
        return repr(self.inner)
