"""An exponential moving average of the weights, of which connections may move.

Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging"; with ``decay=lambda n: n / (n + 1)`` the equal
mean of SWA (Izmailov et al. 2018, arXiv 1803.05407).
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.method import Method
from noctule.core.remap import Remap
from noctule.core.schedule import constant
from noctule.core.types import Schedule
from noctule.sparse.follow import move_twin
from noctule.sparse.layers import SparseLayer


class ExponentialAverage(Method):
    """After each step, moves the weights of a copy of the model a little towards those of the model.

    The copy is `model`, in evaluation mode, to be evaluated, saved or shipped like any model. Its sparse layers have the model's
    places: the average of a connection that is dropped is dropped with it, and that of a new one rises from zero, as in a masked
    dense model. Buffers, such as running statistics, are the model's. In `attach` name it before methods that change weights after
    a step, such as DiLoCo, so that its turn comes after theirs.

    Args:
        decay: the share of the average that stays at an update, in [0, 1], a number or a `Schedule` of the updates done.
        every: steps from one update to the next.

    >>> from noctule.core.method import attach
    >>> network = nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    >>> with attach(network, optimizer, average := ExponentialAverage(0.9)):
    ...     network(torch.ones(1, 3)).sum().backward()
    ...     optimizer.step()
    >>> average.model(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """

    def __init__(self, decay: float | Schedule = 0.999, *, every: int = 1) -> None:
        if isinstance(decay, int | float) and not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.decay: Schedule = decay if callable(decay) else constant(decay)
        self.every = every
        self.steps = 0
        self.model: Any = None
        """The average, from `begin` on, and still after `end`."""
        self._trained: Any = None

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._trained = model.module if isinstance(model, DistributedDataParallel) else model
        if self.model is None:
            self.model = copy.deepcopy(self._trained).eval().requires_grad_(False)
            for layer in self.model.modules():
                if isinstance(layer, SparseLayer):
                    layer.kinship.leave()
        else:
            for name, layer in self._trained.named_modules():
                if isinstance(layer, SparseLayer):  # connections may have moved between two sessions
                    move_twin(self.model.get_submodule(name), layer, Remap.between(layer.topology, layer.topology))

    @torch.no_grad()
    @override
    def after_step(self) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        decay = self.decay(self.steps // self.every - 1)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(
                f"the schedule of ExponentialAverage gave the decay {decay} at step {self.steps}, not one in [0, 1]"
            )
        now = dict(self._trained.named_parameters())
        for name, p in self.model.named_parameters():
            p.lerp_(now[name].to(p), 1.0 - decay)
        buffers = dict(self._trained.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        name = next(name for name, module in self._trained.named_modules() if module is layer)
        move_twin(self.model.get_submodule(name), layer, remap)

    @override
    def end(self) -> None:
        self._trained = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The steps done and the average's own state dict."""
        return {"steps": self.steps, "model": self.model.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.model.load_state_dict(state["model"])
