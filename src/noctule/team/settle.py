"""A method that makes the workers' weights equal before connections move."""

from typing import Any

from typing_extensions import override

from noctule.core.method import Method


class SettleEvery(Method):
    """Settles another method every so many steps; to be attached between a `Rewire` and that method.

    Connections that are chosen by the weights move alike on all workers only where the weights are equal. A method under which they
    differ makes them equal when it settles.

    Args:
        method: what keeps the workers together.
        every: steps from one time to the next.
    """

    def __init__(self, method: Method, *, every: int) -> None:
        self.method, self.every = method, every
        self.steps, self.due = 0, False

    @override
    def after_step(self) -> None:
        self.steps += 1
        self.due = self.due or self.steps % self.every == 0
        self.settle()

    @override
    def settle(self) -> None:
        """Settle the method, if it is time, or if that failed when it was time."""
        if self.due:
            self.method.settle()
            self.due = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "due": self.due}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.due = int(state["steps"]), bool(state["due"])
