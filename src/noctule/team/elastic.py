"""An exchange between whoever is in the team now."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Exchange, Work
from noctule.core.topology import Remap


class Grouped(Protocol):
    """A member of a process group that may be formed anew."""

    member: int
    """Which worker this is, for good."""
    generation: int
    """How many groups it has been in."""

    broken: bool
    """Whether the group is no more."""

    def check(self, *, heeds_calls: bool) -> None:
        """LostWorkerError where one of the group is gone or, to an exchange that heeds it, where the others wait for a new one."""
        ...


class Elastic(Exchange):
    """Made anew by ``make`` in every group; what it kept comes back with the state that the training resumes from.

    What a worker owes is its own: one that goes on from another's state owes nothing.

    Args:
        team: whose group it is.
        make: the exchange, in a group that is new.
        heeds_calls: whether it leaves a group that is whole, where the others wait for a new one.
    """

    def __init__(self, team: Grouped, make: Callable[[], Exchange], *, heeds_calls: bool = True) -> None:
        """Nothing is made yet."""
        self._team, self._make, self._heeds_calls = team, make, heeds_calls
        self._inner: Exchange | None = None
        self._generation = -1
        self._loaded: dict[str, Any] | None = None  # waits for the group
        self._finished = 0

    def forget(self) -> None:
        """Let go of the group that there was: as long as somebody holds it, its connections stay open and the others wait."""
        self._inner = self._loaded = None

    @property
    def inner(self) -> Exchange:
        """That of the group as it is."""
        if self._inner is None or self._generation != self._team.generation:
            self._inner, self._generation = self._make(), self._team.generation
            if self._loaded is not None:
                self._inner.load_state_dict(self._loaded["kept"])
                if self._loaded["member"] != self._team.member:
                    self._inner.release()
                self._loaded = None
        return self._inner

    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """See `Exchange`; LostWorkerError where the group is no more."""
        with self._noticing():
            totals = self.inner(tensors, keys)
        self._finished += 1
        return totals

    def share(self, message: bytes) -> list[bytes]:
        """See `Exchange`; LostWorkerError where the group is no more."""
        with self._noticing():
            return self.inner.share(message)

    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Work:
        """See `Exchange`."""
        return self.inner.rehearse(tensors, keys)

    def release(self) -> dict[str, Tensor]:
        """See `Exchange`."""
        return self.inner.release()

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """See `Exchange`; nothing is kept in a group that has not exchanged, where only some workers may move connections."""
        if self._inner is not None or self._loaded is not None:
            self.inner.remapped(key, remap, shape)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, and of which worker it is; nothing before the first group."""
        if self._loaded is not None or self._inner is None:
            return self._loaded or {}
        return {"member": self._team.member, "finished": self._finished, "kept": self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; of another worker's, what that one owes stays with it."""
        self._inner, self._loaded, self._finished = None, state or None, int(state.get("finished", 0))

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            self._team.check(heeds_calls=self._heeds_calls)
            yield
        except LostWorkerError:
            self._team.broken = True
            raise

    def __repr__(self) -> str:
        """What must be alike on all workers."""
        return repr(self.inner)
