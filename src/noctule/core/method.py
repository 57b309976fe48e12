"""Round `optimizer.step()`: `Method` is what a technique overrides, `attach` calls it at the right moments."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from noctule.core.delivery import StepDelivery
from noctule.core.listeners import listeners
from noctule.core.optim import (
    RunningSteps,
    carry_state,
    check_carry,
    replace_parameter,
    sparse_layers,
    unwrapped,
    will_skip,
)
from noctule.core.ranks import check_places_of_ranks
from noctule.core.remap import Remap

_attached: WeakSet[Any] = WeakSet()
"""Optimizers and sparse layers that an open session dispatches for: moving their state twice would scramble it."""


class Method:
    """A technique that acts round the optimizer's step: override what you need, by default each moment does nothing."""

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """The session opens; if this raises, `end` is not called."""

    def before_step(self) -> None:
        """Gradients are complete and final, weights not moved; raising stops the step, nothing else can."""

    def after_step(self) -> None:
        """Weights have moved; gradients may be there still."""

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """The places of a layer's weights changed, or the width of a module: move what you keep for it."""

    def observe(self, **metrics: float) -> None:
        """Something was measured, such as a validation loss."""

    def settle(self) -> None:
        """The weights are about to be judged or shipped: finish what is under way, such as a meeting with other workers."""

    def end(self) -> None:
        """The session closes."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as dicts, lists, tensors, numbers, strings, booleans and None, as a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def attach(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], *methods: Method) -> "Session":
    """Call `methods` round the steps of one or several optimizers, in your own loop, until the session is closed.

    `before_step` runs in the order of `methods`, `after_step` and `end` in reverse. With several optimizers a *round*
    is one step of each: `before_step` comes before its first step, `after_step` after its last. If one `after_step` raises, the
    rest are called before the next forward pass (see `StepDelivery`). An optimizer that steps again before the others have (as in
    adversarial training) closes the round first and opens the next; so does leaving the session. Steps that a GradScaler skips
    for an overflow do not count, nor do micro-batches.

    When a sparse layer changes its places, or any module its width, the optimizers' state follows, then every method's `remapped`
    is called. An optimizer may hold another one inside (Lookahead, SAM, ZeroRedundancyOptimizer, what accelerate or Lightning
    prepared): it is one of the round, whichever of the two steps, and the state of both follows. Model, optimizers and session may
    load their states in any order: where places come with a model, what was loaded before since the last step is of these places
    already.

    Raises:
        ValueError: a trainable parameter is in none of the optimizers (looked at again at the first step), or the ranks of
            `DistributedDataParallel` have their connections at different places.
        RuntimeError: an optimizer or a sparse layer is in another open session; later, at a step: a fused optimizer is
            about to step on gradients that a GradScaler has scaled.

    >>> model = nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with attach(model, optimizer, Method()) as session:
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     optimizer.step()
    >>> session.steps
    1
    """
    several = tuple(optimizers) if isinstance(optimizers, Iterable) else (optimizers,)
    for kind, things in ((Optimizer, several), (Method, methods)):
        for thing in things:
            if not (isinstance(thing, Method) if kind is Method else unwrapped(thing)):
                raise TypeError(f"attach(model, optimizers, *methods) needs {kind.__name__} objects, got {thing!r}")
        if len({id(thing) for thing in things}) < len(things):
            raise ValueError(f"attach got the same {kind.__name__} twice: name each once")
    if not several:
        raise ValueError("attach got no optimizer: give it one, or a list of them")
    return Session(model, several, methods)


class Session:
    """What `attach` returns: a context manager that undoes everything on exit; `close()` does the same.

    Use `attach` to make one: it checks what it is given.
    """

    def __init__(self, model: nn.Module, optimizers: tuple[Optimizer, ...], methods: tuple[Method, ...]) -> None:
        self.model, self.optimizers, self.methods = model, tuple(unwrapped(given)[0] for given in optimizers), methods
        self._places = {inner: place for place, given in enumerate(self.optimizers) for inner in unwrapped(given)}
        """All optimizers, those inside others too, and which of the given ones each belongs to."""
        self._restored: set[Optimizer | Method] = set()
        """What has loaded its state since the last step."""
        self.steps = 0
        """How many rounds of steps are done."""
        self._begun: list[Method] = []
        self._layers: set[nn.Module] = set()
        self._checked = False
        self._round: dict[int, bool] = {}  # place of each optimizer that was called -> did it really step?
        self._moving = False  # the step in progress is a real one, and before_step was called
        self._running = RunningSteps()
        self._undo = ExitStack()
        self._hooks = self._undo.enter_context(ExitStack())
        try:
            before: Any = torch.compiler.disable(self._before)
            after: Any = torch.compiler.disable(self._after)
            for optimizer in self._places:
                self._claim(optimizer, type(optimizer).__name__)
                if "_optimizer_step_pre_hooks" in vars(
                    optimizer
                ):  # else a wrapper that never called super().__init__()
                    self._hooks.callback(optimizer.register_step_pre_hook(before).remove)
                    self._hooks.callback(optimizer.register_step_post_hook(after).remove)
                    self._hooks.callback(optimizer.register_load_state_dict_post_hook(self._restored.add).remove)
            self._check_model()
            check_places_of_ranks(model)
            for method in methods:
                method.begin(model, self.optimizers)
                self._begun.append(method)
                self._undo.callback(lambda: self._begun.pop().end())
            self._delivery = self._undo.enter_context(closing(StepDelivery(model, methods)))
            self._undo.callback(self._finish_round)
            listeners.add(self)
            self._hooks.callback(listeners.discard, self)
        except BaseException:
            self._undo.close()
            raise

    def observe(self, **metrics: float) -> None:
        """Pass to every method what was measured, such as `validation_loss=0.3`."""
        for method in self.methods:
            method.observe(**metrics)

    def settle(self) -> None:
        """Have every method finish what is under way, before the weights are judged or shipped; in reverse, as after a step."""
        for method in reversed(self.methods):
            method.settle()
        self._delivery.deliver()

    def state_dict(self) -> dict[str, Any]:
        """The number of finished rounds, the methods still pending after the last one, and every method's state, as plain data."""
        entries = [{"name": type(method).__name__, "state": method.state_dict()} for method in self.methods]
        return {"steps": self.steps, "pending": list(self._delivery.pending), "methods": entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raises ValueError, with no method touched, if it is of other methods."""
        try:
            steps, names = int(state["steps"]), [entry["name"] for entry in state["methods"]]
            parts = [entry["state"] for entry in state["methods"]]
            pending = [
                int(place) for place in state.get("pending", state.get("waiting", ()))
            ]  # the name in older states
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not what Session.state_dict() gave: {error!r}") from error
        have = [type(method).__name__ for method in self.methods]
        if names != have:
            raise ValueError(f"this state belongs to the methods {names}, the session has {have}: attach the same ones")
        self._delivery.restore(pending)
        for method, part in zip(self.methods, parts, strict=True):
            method.load_state_dict(part)
        self._restored.update(self.methods)
        self.steps = steps

    def close(self) -> None:
        """Finish an unfinished round, end the methods in reverse and remove every hook; a second call does nothing."""
        self._running.clear()
        self._undo.close()

    def __enter__(self) -> Self:
        """This session, open already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; but a loop that failed gets no `after_step` for the round it did not finish."""
        if kind is not None:
            self._round = {}
        self.close()

    def _claim(self, thing: Any, name: str) -> None:
        if thing in _attached:
            raise RuntimeError(
                f"{name} is attached already: give all methods to one attach(), or close that session first"
            )
        _attached.add(thing)
        self._hooks.callback(_attached.discard, thing)

    def _check_model(self) -> None:
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        lost = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if lost:
            raise ValueError(
                f"{len(lost)} trainable parameters are in none of the attached optimizers: {', '.join(lost[:8])}"
                f"{', ...' if len(lost) > 8 else ''}. "
                "Build the optimizer after convert_ (or whatever made them), or freeze them: requires_grad_(False)"
            )
        for name, layer in sparse_layers(self.model).items():
            if layer not in self._layers:
                self._claim(layer, name or type(layer).__name__)
                self._layers.add(layer)
                self._hooks.callback(layer.register_remap_check(self.check_remap).remove)
                self._hooks.callback(layer.register_remap_hook(self.remapped).remove)

    # Called by the layers, and by what changes the width of another module.

    def check_remap(self, module: nn.Module, remap: Remap) -> None:
        """Refuse, before anything moved, a change of a module's weights that an optimizer here cannot follow."""
        for name, parameter in module.named_parameters(recurse=False):
            part = remap.of(name)
            if part is None:
                continue
            check_carry(self._followers(remap), parameter)
            if part.new_size != part.old_size and any(
                isinstance(m, DistributedDataParallel) for m in self.model.modules()
            ):
                raise ValueError(
                    f"a layer cannot go from {part.old_size} to {part.new_size} weights inside DistributedDataParallel, "
                    "which keeps buckets of the old ones: change the plain model, then wrap it again"
                )

    def remapped(self, module: nn.Module, old: Mapping[str, Tensor], remap: Remap) -> None:
        """A module's weights changed: move the optimizers' state of its parameters, `old` by name, and call the methods."""
        for name, before in old.items():
            if (part := remap.of(name)) is not None:
                new = getattr(module, name)
                carry_state(self._followers(remap), before, new, part)
                for optimizer in self._places:
                    replace_parameter(optimizer, before, new)
        for method in self._begun:
            method.remapped(module, remap.stays() if remap.loaded and method in self._restored else remap)

    def _followers(self, remap: Remap) -> list[Optimizer]:
        """The optimizers whose state is of the places before."""
        return [o for o in self._places if not (remap.loaded and o in self._restored)]

    # Called by the optimizers' hooks.

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not self._running.enter(optimizer):  # super().step(), or an optimizer inside another
            return None
        if not self._checked:
            self._check_model()
            self._checked = True
        if self._places[optimizer] in self._round:
            self._finish_round()
        self._moving = False
        self._restored.clear()
        if will_skip(optimizer):
            return None
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._announcing(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._announcing(kwargs["closure"])}
        self._announce()
        return None

    def _announcing(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure; after its first evaluation there are gradients, and weights have not moved."""

        def wrapped(*args: Any) -> Any:
            loss = closure(*args)
            if not self._moving:
                self._announce()
            return loss

        return wrapped

    def _announce(self) -> None:
        self._moving = True
        if not any(self._round.values()):
            self._delivery.deliver()
            for method in self.methods:
                method.before_step()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer = self._running.leave()
        if outer is None:
            self._round[self._places[optimizer]] = self._moving
            if len(self._round) == len(self.optimizers):
                self._finish_round()
        elif self._places[outer] != self._places[optimizer]:
            self._round[self._places[optimizer]] = True

    def _finish_round(self) -> None:
        moved, self._round = any(self._round.values()), {}
        if moved:
            self.steps += 1
            self._delivery.step()
