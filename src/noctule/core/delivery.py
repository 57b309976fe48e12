"""Calls `after_step` on the methods, also on those that come after one that raised."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Stepping(Protocol):
    """The two members of a `Method` that `StepDelivery` calls."""

    def after_step(self) -> None:
        """The optimizers have stepped."""
        ...

    def settle(self) -> None:
        """Finish what is under way."""
        ...


class StepDelivery:
    """Calls `after_step` on the methods in reverse, once for each step.

    If one raises, such as for a lost worker, the rest stay pending. They are called before the next forward pass in training
    mode, at the latest before the next step. So the one that raised can recover first, in a forward pre-hook of its own or in
    `settle`.

    Args:
        model: whose forward passes these are.
        methods: in the order of `attach`.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Stepping]) -> None:
        self.pending: list[int] = []
        """The indices of the methods whose `after_step` is still to be called, in the order of the calls."""
        self.failed: list[int] = []
        """The index of the method that raised in the last delivery, if any."""
        self._model, self._methods = model, methods
        self._hook: RemovableHandle | None = None

    def step(self) -> None:
        """A step was done: call every method."""
        self.pending += reversed(range(len(self._methods)))
        self.deliver()

    def deliver(self) -> None:
        """Call the pending methods, up to one that raises."""
        try:
            while self.pending:
                self.failed = [self.pending.pop(0)]  # until it has returned
                self._methods[self.failed[0]].after_step()
            self.failed = []
        finally:
            self._hook_if_pending()

    def resume(self) -> None:
        """Call `settle` on the method that raised, then the pending ones."""
        for index in self.failed:
            self._methods[index].settle()
        self.deliver()

    def restore(self, pending: Iterable[int], failed: Iterable[int] = ()) -> None:
        """Set what is pending and what failed, such as from a checkpoint.

        Raises:
            ValueError: there are not so many methods.
        """
        indices, failures = list(pending), list(failed)
        if not {*indices, *failures} <= {*range(len(self._methods))}:
            raise ValueError(
                f"there are {len(self._methods)} methods, but {indices} are pending and {failures} failed: attach the same methods"
            )
        self.pending, self.failed = indices, failures
        self._hook_if_pending()

    def close(self) -> None:
        """Drop what is pending."""
        self.restore(())

    def _hook_if_pending(self) -> None:
        """Have a hook on the model only while methods are pending: last in line, behind those of the methods."""
        if self.pending and self._hook is None:
            hook: Any = torch.compiler.disable(self._before_forward)
            self._hook = before_forward(self._model, hook)
        elif not self.pending and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self.deliver()


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
