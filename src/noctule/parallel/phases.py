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

    A method that fails in the last step of its phase, as where another worker is lost, is asked to `settle` before the phase ends:
    at the next forward pass, also in a training that goes on from the state of then.

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
        self._failed: list[int] = []  # in the last step of their phase, which has not ended yet
        self._undo = ExitStack()

    @property
    def phase(self) -> int:
        """The number of the phase that the next step is in."""
        return self._at(self.steps)

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
        """That of the phase; if this was its last step, and none failed, the next one begins."""
        failed: dict[int, Exception] = {}
        for number, method in reversed([*enumerate(self._running)]):
            try:
                method.after_step()
            except Exception as error:  # the others hear of the step all the same: their counts stay together
                failed[number] = error
        self.steps += 1
        if self.phase != self._begun:
            self._failed = [*failed]
        if failed:
            raise next(iter(failed.values()))
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
        """That of the phase, which begins for it: a training that is resumed may have this left to do, and no step."""
        if self.steps:
            self._ensure()
        for method in reversed(self._running):
            method.settle()

    def end(self) -> None:
        """That of the phase."""
        try:
            self._stop()
        finally:
            self._undo.close()

    def state_dict(self) -> dict[str, Any]:
        """The steps done, which methods failed in the last one of their phase, and the states of those that run."""
        states = self._waiting
        if self._begun is not None:
            states = [{"name": type(method).__name__, "state": method.state_dict()} for method in self._running]
        return {"steps": self.steps, "failed": list(self._failed), "methods": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it is of other methods, or of another phase than the one that runs.
        """
        steps, found = int(state["steps"]), state["methods"]
        failed = list(state.get("failed", ()))  # which older states lack
        phase = self._at(steps - bool(failed))
        have = [type(method).__name__ for method in self.phases[phase]]
        if found is not None and [entry["name"] for entry in found] != have:
            raise ValueError(
                f"this state belongs to the methods {[entry['name'] for entry in found]}, phase {phase} has {have}: make the same "
                "phases"
            )
        if self._begun not in (None, phase):
            raise ValueError(
                f"phase {self._begun} has begun, and this state is of phase {phase}: load it before the first forward pass"
            )
        self.steps, self._failed = steps, failed
        if self._begun is None:
            self._waiting = found
        else:
            self._load(found)

    def _at(self, steps: int) -> int:
        """The phase of the step that comes after so many."""
        return sum(steps >= step for step in self.until)

    def _forward(self, model: nn.Module, args: Any) -> None:
        self._ensure()

    def _ensure(self) -> None:
        """Begin the phase, unless it has begun; the one before ends first."""
        if self._begun is None:
            self._begin(self._at(self.steps - bool(self._failed)))
        if self._begun != self.phase:
            for number in self._failed:
                self._running[number].settle()
            self._failed = []
            self._stop()
            self._begin(self.phase)

    def _begin(self, phase: int) -> None:
        self._begun = phase
        try:
            for method in self.phases[phase]:
                method.begin(self.model, self.optimizers)
                self._running.append(method)
            self._load(self._waiting)
            self._waiting = None  # no sooner: a server that is away now may be there at the next forward pass
        except BaseException:
            self._stop()
            raise

    def _load(self, states: Sequence[dict[str, Any]] | None) -> None:
        for method, entry in zip(self._running, states or (), strict=False):
            method.load_state_dict(entry["state"])

    def _stop(self) -> None:
        """End the methods that run, in reverse, each whatever the others do."""
        self._begun = None
        with ExitStack() as stack:
            for _ in self._running:
                stack.callback(lambda: self._running.pop().end())
