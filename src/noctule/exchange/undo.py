"""Backward passes whose exchanges are delivered as a whole or not at all."""

from typing import Any, Protocol


class Stateful(Protocol):
    """An exchange or a stage, or a part of one."""

    def state_dict(self) -> dict[str, Any]:
        """Its state; what is kept for tensors is replaced by every exchange, never changed."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        ...


class Undo:
    """The states of exchanges or stages at the begin of a backward pass, restored if any part of the pass fails."""

    def __init__(self, *kept: Stateful) -> None:
        self.failed = False
        """Whether a part failed, or is not finite, so that the step will be skipped."""
        self._states = [(each, each.state_dict()) for each in kept]

    def restore(self) -> None:
        """Restore the states at once, because a part failed."""
        self.failed = True
        for each, state in self._states:
            each.load_state_dict(state)

    def end(self) -> None:
        """End the pass: restore the states if a part failed, and forget them."""
        if self.failed:
            self.restore()
        self._states = []
