"""A method that speaks with a process group by itself, without an exchange, in a team whose group is formed anew."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.errors import LostWorkerError
from noctule.core.method import Method
from noctule.core.remap import Remap
from noctule.team.strategy import GroupMember


class Regrouped(Method):
    """Makes the method anew in each session, and so in each group; its state comes back with the state that training resumes from.

    Args:
        member: the worker, marked as `broken` when the group has lost a worker.
        make: the method, in the group as it is.
    """

    def __init__(self, member: GroupMember, make: Callable[[], Method]) -> None:
        self.member, self.make = member, make
        self._inner: Method | None = None  # none between two sessions: it would hold the old group's connections open
        self._finished = 0

    @property
    def inner(self) -> Method:
        """The method of this session."""
        assert self._inner is not None
        return self._inner

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._inner = self.make()
        self._inner.begin(model, optimizers)

    @override
    def before_step(self) -> None:
        self.inner.before_step()

    @override
    def after_step(self) -> None:
        with self._noticing():
            self.inner.after_step()

    @override
    def settle(self) -> None:
        with self._noticing():
            self.inner.settle()

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        self.inner.remapped(layer, remap)

    @override
    def observe(self, **metrics: float) -> None:
        self.inner.observe(**metrics)

    @override
    def end(self) -> None:
        self.inner.end()
        self._inner = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The method's state, and how many exchanges are finished, by which workers find the one that is furthest."""
        return {"finished": self._finished, "kept": self.inner.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._finished = int(state["finished"])
        self.inner.load_state_dict(state["kept"])

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except LostWorkerError:
            self.member.broken = True
            raise
        self._finished += 1
