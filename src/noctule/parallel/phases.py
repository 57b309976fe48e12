"""Methods that follow one another: from a given step on, others run."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from noctule.method import Method
from noctule.topology import Remap


class Phases(Method):
    """Runs the first methods until a step, then the next ones; those of a phase begin when it does, and end before the next.

    The first one begins with the first forward pass of the model: a state that is loaded before decides which phase that is, and
    the earlier ones never begin. Within a phase the order is that of `attach`.

    Args:
        phases: the methods of each.
        until: the number of steps after which each of them but the last ends.

    >>> from noctule import set_
    >>> several = Phases([set_(every=10)], [], until=[1000])
    """

    def __init__(self, *phases: Sequence[Method], until: Sequence[int]) -> None:
        """Nothing begins yet."""
        self.phases, self.until = tuple(tuple(phase) for phase in phases), tuple(until)
        if len(self.until) != len(self.phases) - 1:
            raise ValueError(
                f"{len(self.phases)} phases need {len(self.phases) - 1} steps at which they end, got {until!r}"
            )
        if any(after <= before for before, after in zip((0, *self.until), self.until, strict=False)):
            raise ValueError(f"the steps at which phases end must be above 0 and increase, got {until!r}")
        if len({id(method) for phase in self.phases for method in phase}) < sum(map(len, self.phases)):
            raise ValueError("Phases got the same method twice: make one for each phase, since it ends with its phase")
        self.steps = 0
        """Steps done."""
        self._running: list[Method] = []
        self._begun: int | None = None
        self._waiting: list[dict[str, Any]] | None = None
        self._undo = ExitStack()

    @property
    def phase(self) -> int:
        """The number of the phase that the next step is in."""
        return sum(self.steps >= step for step in self.until)

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Wait for the first forward pass."""
        self.model, self.optimizers = model, optimizers
        hook: Any = torch.compiler.disable(self._forward)
        self._undo.callback(model.register_forward_pre_hook(hook).remove)

    def before_step(self) -> None:
        """That of the phase."""
        self._ensure()
        for method in self._running:
            method.before_step()

    def after_step(self) -> None:
        """That of the phase; if this was its last step, the next one begins."""
        for method in reversed(self._running):
            method.after_step()
        self.steps += 1
        if self.phase != self._begun:
            self._stop()
            self._ensure()

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """That of the phase."""
        for method in self._running:
            method.remapped(layer, remap)

    def observe(self, **metrics: float) -> None:
        """That of the phase."""
        for method in self._running:
            method.observe(**metrics)

    def settle(self) -> None:
        """That of the phase."""
        for method in reversed(self._running):
            method.settle()

    def end(self) -> None:
        """That of the phase."""
        try:
            self._stop()
        finally:
            self._undo.close()

    def state_dict(self) -> dict[str, Any]:
        """The steps done, and the states of the methods that run."""
        states = self._waiting
        if self._begun is not None:
            states = [{"name": type(method).__name__, "state": method.state_dict()} for method in self._running]
        return {"steps": self.steps, "methods": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it is of other methods, or of another phase than the one that runs.
        """
        before, self.steps = self.steps, int(state["steps"])
        try:
            have = [type(method).__name__ for method in self.phases[self.phase]]
            found = state["methods"]
            if found is not None and [entry["name"] for entry in found] != have:
                raise ValueError(
                    f"this state belongs to the methods {[entry['name'] for entry in found]}, phase {self.phase} has {have}: make "
                    "the same phases"
                )
            if self._begun not in (None, self.phase):
                raise ValueError(
                    f"phase {self._begun} has begun, and this state is of phase {self.phase}: load it before the first forward pass"
                )
        except ValueError:
            self.steps = before
            raise
        self._waiting = found
        if self._begun is not None:
            self._load()

    def _forward(self, model: nn.Module, args: Any) -> None:
        self._ensure()

    def _ensure(self) -> None:
        """Begin the phase, unless it has begun."""
        if self._begun is None:
            self._begun = self.phase
            try:
                for method in self.phases[self._begun]:
                    method.begin(self.model, self.optimizers)
                    self._running.append(method)
                self._load()
            except BaseException:
                self._stop()
                raise

    def _load(self) -> None:
        states, self._waiting = self._waiting, None
        for method, entry in zip(self._running, states or (), strict=False):
            method.load_state_dict(entry["state"])

    def _stop(self) -> None:
        """End the methods that run, in reverse, each whatever the others do."""
        self._begun = None
        with ExitStack() as stack:
            for _ in self._running:
                stack.callback(lambda: self._running.pop().end())
