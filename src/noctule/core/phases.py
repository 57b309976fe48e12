"""A method that runs other methods in phases: from a given step on, the next ones."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.delivery import StepDelivery, before_forward
from noctule.core.method import Method
from noctule.core.remap import Remap


class Phases(Method):
    """Runs the methods of the first phase until a step, then those of the next; each begins and ends with its phase.

    The first phase begins with the first forward pass of the model: a state that is loaded before decides which phase that is, and
    the methods of earlier phases never begin. Within a phase the order is that of `attach`.

    If a method raises in the last step of its phase, as when a worker is lost, `settle` is called on it before the phase ends, at
    the next forward pass; after a failure in any step so it is in the first forward pass of a training that resumes from there.

    Args:
        phases: the methods of each phase.
        until: the numbers of steps after which each phase but the last ends.

    >>> from noctule import set_
    >>> several = Phases([set_(every=10)], [], until=[1000])
    """

    def __init__(self, *phases: Sequence[Method], until: Sequence[int]) -> None:
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
        """The number of steps done."""
        self._running: list[Method] = []
        self._begun: int | None = None
        self._loaded: dict[str, Any] | None = None  # waits for its phase to begin
        self._undo = ExitStack()

    @property
    def phase(self) -> int:
        """The number of the phase that the next step is in."""
        return self._at(self.steps)

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Wait for the first forward pass."""
        self.model, self.optimizers = model, optimizers
        self._delivery = StepDelivery(model, self._running)
        hook: Any = torch.compiler.disable(self._forward)
        self._undo.callback(before_forward(model, hook).remove)

    def before_step(self) -> None:
        """That of the phase."""
        self._ensure()
        for method in self._running:
            method.before_step()

    def after_step(self) -> None:
        """That of the phase; if this was its last step, and none failed, the next one begins."""
        self.steps += 1
        self._delivery.step()
        self._ensure()

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        for method in self._running:
            method.remapped(layer, remap)

    @override
    def observe(self, **metrics: float) -> None:
        for method in self._running:
            method.observe(**metrics)

    def settle(self) -> None:
        """That of the phase, which begins for it: a training that is resumed may have this left to do, and no step."""
        if self.steps:
            self._ensure()
        for method in reversed(self._running):
            method.settle()
        self._delivery.deliver()

    def end(self) -> None:
        """That of the phase."""
        try:
            self._stop()
        finally:
            self._undo.close()

    def state_dict(self) -> dict[str, Any]:
        """The steps done, the methods that failed or are pending in the last one, and the states of the running methods."""
        if self._begun is None:
            return self._loaded or {"steps": self.steps, "failed": [], "waiting": [], "methods": None}
        states = [{"name": type(method).__name__, "state": method.state_dict()} for method in self._running]
        return {
            "steps": self.steps,
            "failed": list(self._delivery.failed),
            "waiting": list(self._delivery.pending),
            "methods": states,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of other methods, or of another phase than the running one.
        """
        steps, found = int(state["steps"]), state["methods"]
        state = {"steps": steps, "failed": [], "waiting": [], **state}  # which older ones lack
        phase = self._last(state)
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
        self.steps, self._loaded = steps, state
        if self._begun is not None:
            self._load()

    def _at(self, steps: int) -> int:
        """The phase of the step after so many."""
        return sum(steps >= step for step in self.until)

    def _last(self, state: dict[str, Any]) -> int:
        """The phase of a state: that of its last step, if methods have failed or are pending in it."""
        return self._at(int(state["steps"]) - bool(state["failed"] or state["waiting"]))

    def _forward(self, model: nn.Module, args: Any) -> None:
        self._ensure()

    def _ensure(self) -> None:
        """Begin the phase, unless it has begun; the one before ends first."""
        if self._begun is None:
            self._begin(self.phase if self._loaded is None else self._last(self._loaded))
            self._delivery.resume()  # hooks that began in a forward pass are no part of it
        if self._begun != self.phase:
            self._delivery.resume()
            self._stop()
            self._begin(self.phase)

    def _begin(self, phase: int) -> None:
        self._begun = phase
        try:
            for method in self.phases[phase]:
                method.begin(self.model, self.optimizers)
                self._running.append(method)
            self._load()
        except BaseException:
            self._stop()
            raise

    def _load(self) -> None:
        """Give the methods that run what was loaded, if anything."""
        if (state := self._loaded) is not None:
            for method, entry in zip(self._running, state["methods"] or (), strict=False):
                method.load_state_dict(entry["state"])
            self._delivery.restore(state["waiting"], state["failed"])
            self._loaded = None  # no sooner: a server that is away now may be there at the next forward pass

    def _stop(self) -> None:
        """End the methods that run, in reverse, each whatever the others do."""
        self._begun = None
        self._delivery.restore(())
        with ExitStack() as stack:
            for _ in self._running:
                stack.callback(lambda: self._running.pop().end())
