"""Round `optimizer.step()`: `Method` is what a technique overrides, `attach` calls it at the right moments."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

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
from noctule.core.topology import Remap

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
        """The places of a layer's weights changed, or the width of a module (whoever changed them): move what you keep for it."""

    def observe(self, **metrics: float) -> None:
        """Somebody measured something, such as a validation loss, and says so."""

    def settle(self) -> None:
        """The weights are about to be judged or shipped: finish what is under way, such as a meeting with other workers."""

    def end(self) -> None:
        """The session closes."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as dicts, lists, tensors, numbers, strings, booleans and None, as a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Turns:
    """Tells methods of each step, in reverse; who comes after one that failed hears of it later.

    One that could not finish, as where another worker was lost, can so make up for it first, in a forward pre-hook or when it is
    asked to settle: the others are told right before the next forward pass in training mode, at the latest before the next step.

    Args:
        model: whose forward passes these are.
        methods: in the order of `attach`.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method]) -> None:
        """All have heard of all steps."""
        self.waiting: list[int] = []
        """The places, among the methods, of those that have not heard of a step, in the order in which they will."""
        self.failed: list[int] = []
        """That of the one that failed when they were last told, if any."""
        self._model, self._methods = model, methods
        self._hook: RemovableHandle | None = None

    def step(self) -> None:
        """A step was done."""
        self.waiting += reversed(range(len(self._methods)))
        self.go_on()

    def go_on(self) -> None:
        """Tell those who wait, up to one that fails."""
        try:
            while self.waiting:
                self.failed = [self.waiting.pop(0)]  # until it has not
                self._methods[self.failed[0]].after_step()
            self.failed = []
        finally:
            self._listen()

    def make_up(self) -> None:
        """Who failed is asked to settle, then those who wait are told."""
        for place in self.failed:
            self._methods[place].settle()
        self.go_on()

    def wait(self, waiting: Iterable[int], failed: Iterable[int] = ()) -> None:
        """These are the ones who wait, and who failed.

        Raises:
            ValueError: there are not so many methods.
        """
        places, failures = list(waiting), list(failed)
        if not {*places, *failures} <= {*range(len(self._methods))}:
            raise ValueError(
                f"there are {len(self._methods)} methods, of which {places} wait to hear of a step that {failures} failed in"
            )
        self.waiting, self.failed = places, failures
        self._listen()

    def close(self) -> None:
        """Who has not heard will not."""
        self.wait(())

    def _listen(self) -> None:
        """Have a hook on the model only while somebody waits: last in line, behind those of the methods."""
        if self.waiting and self._hook is None:
            hook: Any = torch.compiler.disable(self._before_forward)
            self._hook = before_forward(self._model, hook)
        elif not self.waiting and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self.go_on()


def attach(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], *methods: Method) -> "Session":
    """Call `methods` round the steps of one or several optimizers, in your own loop, until the session is closed.

    `before_step` runs in the order of `methods`, `after_step` and `end` in reverse. With several optimizers a *round*
    is one step of each: `before_step` comes before its first step, `after_step` after its last; if one raises there, the methods
    whose turn comes later hear of the step before the next forward pass. An optimizer that steps
    again before the others have (as in adversarial training) closes the round first and opens the next; so does leaving
    the session. Steps that a GradScaler skips for an overflow do not count, nor do micro-batches.

    When a sparse layer changes its places, or any module its width, the optimizers' state follows, then every method is told.
    An optimizer may hold another one inside (Lookahead, SAM, ZeroRedundancyOptimizer, what accelerate or Lightning prepared): it
    is one of the round, whichever of the two steps, and the state of both follows. Model, optimizers and session may load their
    states in any order: where places come with a model, what was loaded before since the last step is of these places already.

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


def before_forward(model: nn.Module, hook: Callable[[nn.Module, Any], None]) -> RemovableHandle:
    """Register a forward pre-hook that stays with this model: in a copy of the model it does nothing."""
    return model.register_forward_pre_hook(_OwnHook(hook))


class _OwnHook:
    def __init__(self, hook: Callable[[nn.Module, Any], None] | None) -> None:
        self._hook = hook

    def __call__(self, model: nn.Module, args: Any) -> None:
        if self._hook is not None:
            self._hook(model, args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_OwnHook":
        return _OwnHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _OwnHook, (None,)


class Session:
    """What `attach` returns: a context manager that undoes everything on exit; `close()` does the same."""

    def __init__(self, model: nn.Module, optimizers: tuple[Optimizer, ...], methods: tuple[Method, ...]) -> None:
        """Open a session; use `attach`, which checks what it is given."""
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
        self._round: dict[int, bool] = {}  # place of each optimizer that had its turn -> did it really step?
        self._moving = False  # the step in progress is a real one, and the methods know of it
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
                ):  # not so in a wrapper that never called super().__init__()
                    self._hooks.callback(optimizer.register_step_pre_hook(before).remove)
                    self._hooks.callback(optimizer.register_step_post_hook(after).remove)
                    self._hooks.callback(optimizer.register_load_state_dict_post_hook(self._restored.add).remove)
            self._check_model()
            check_places_of_ranks(model)
            for method in methods:
                method.begin(model, self.optimizers)
                self._begun.append(method)
                self._undo.callback(lambda: self._begun.pop().end())
            self._turns = self._undo.enter_context(closing(Turns(model, methods)))
            self._undo.callback(self._finish_round)
            listeners.add(self)
            self._hooks.callback(listeners.discard, self)
        except BaseException:
            self._undo.close()
            raise

    def observe(self, **metrics: float) -> None:
        """Tell every method what was measured, such as `validation_loss=0.3`."""
        for method in self.methods:
            method.observe(**metrics)

    def settle(self) -> None:
        """Have every method finish what is under way, before the weights are judged or shipped; in reverse, as after a step."""
        for method in reversed(self.methods):
            method.settle()
        self._turns.go_on()

    def state_dict(self) -> dict[str, Any]:
        """The number of finished rounds, who has not heard of the last one yet, and every method's state, as plain data."""
        entries = [{"name": type(method).__name__, "state": method.state_dict()} for method in self.methods]
        return {"steps": self.steps, "waiting": list(self._turns.waiting), "methods": entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; raises ValueError, with no method touched, if it is of other methods."""
        try:
            steps, names = int(state["steps"]), [entry["name"] for entry in state["methods"]]
            parts = [entry["state"] for entry in state["methods"]]
            waiting = [int(place) for place in state.get("waiting", ())]  # which older states lack
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not what Session.state_dict() gave: {error!r}") from error
        have = [type(method).__name__ for method in self.methods]
        if names != have:
            raise ValueError(f"this state belongs to the methods {names}, the session has {have}: attach the same ones")
        self._turns.wait(waiting)
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

    # What the layers call, and whoever changes the width of another module.

    def check_remap(self, module: nn.Module, remap: Remap) -> None:
        """Refuse, before anything moved, a change of a module's weights that somebody here cannot follow."""
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
        """A module's weights changed: move the optimizers' state of its parameters, `old` by name, and tell the methods."""
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

    # What the optimizers call.

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
            self._turns.go_on()
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
            self._turns.step()
