"""The backward passes that a step is made of: growers capture these and no others."""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from noctule.sparse.layers import SparseLayer


class Passes:
    """The backward passes of a layer whose gradient is in ``values.grad`` when the optimizer steps.

    A pass counts once its gradient was added there, so ``torch.autograd.grad`` does not; and no longer once that was zeroed or set
    to None, so neither does one whose step was skipped (an overflow, a guard against NaN), nor an analysis between two steps.
    Nor does one that comes after the layer's weights moved, as in the step of another optimizer.

    Args:
        layer: the layer that is watched from now on.
        make: makes a capture, anew where earlier passes no longer count.
        capture: the first one.
    """

    def __init__(self, layer: SparseLayer, make: Callable[[], Any], capture: Any) -> None:
        self.layer, self.make, self.capture = layer, make, capture
        self._seen = False
        self._task = -1
        self._pending: list[tuple[Tensor, Any]] = []
        self._noted: tuple[Any, int] = (lambda: None, 0)
        """The gradient after the last pass that counts, and its version then: as long as these are the same it was not zeroed."""
        self._weights: int | None = None
        """The version of the weights when the step was announced."""
        values = layer.values
        self._handles = [
            values.register_hook(self._before_added),
            values.register_post_accumulate_grad_hook(self._added),
        ]
        layer.watch = self

    def __call__(self, dy: Tensor, x: Any) -> None:
        """A pass came through the layer; whether its gradient will be added is not known yet."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._pending.clear()
            self._task = task
        if not self._moved():
            self._pending.append((dy, x))

    def announce(self) -> None:
        """The step begins: what counts is what is in the gradient now, until the weights move."""
        self._weights = self.layer.values._version

    def final(self) -> Any:
        """The capture of the passes of the step that was made."""
        if torch._C._current_graph_task_id() == self._task:  # an optimizer that steps in the backward pass
            self._show()
        self._forget_zeroed()
        return self.capture

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self.layer.watch = None

    @torch.utils.hooks.unserializable_hook  # a model that is sent to another process goes without
    def _before_added(self, gradient: Tensor) -> None:
        self._forget_zeroed()

    def _added(self, values: Tensor) -> None:
        self._show()
        if values.grad is not None:
            self._noted = (ref(values.grad), values.grad._version)

    def _show(self) -> None:
        for dy, x in self._pending:
            self.capture(dy, x)
            self._seen = True
        self._pending.clear()

    def _moved(self) -> bool:
        """Whether the step of this layer's optimizer was made."""
        return self._weights is not None and self._weights != self.layer.values._version

    def _forget_zeroed(self) -> None:
        gradient, (noted, version) = self.layer.values.grad, self._noted
        if (
            not self._seen
            or self._moved()
            or (gradient is not None and gradient is noted() and gradient._version == version)
        ):
            return
        if gradient is None or not gradient.any():
            self.capture, self._seen = self.make(), False
