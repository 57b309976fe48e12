"""Train apart, and meet every so many steps: the distance each worker went is a gradient for an outer optimizer.

Douillard et al. 2023, "DiLoCo", arXiv 2311.08105; with an outer ``SGD(lr=1)`` it is local SGD (McMahan et al. 2017, arXiv
1602.05629). Differs from the paper: what travels goes through any exchange, so it can be compressed, and the inner and outer
optimizers are whatever torch has.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from noctule.channel import Exchange
from noctule.exchange.handshake import agree, agree_on_places
from noctule.method import Method
from noctule.optim import carry_state
from noctule.topology import Remap

NESTEROV = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
"""The outer optimizer of DiLoCo."""
AVERAGE = partial(SGD, lr=1.0)
"""That of local SGD: what comes is the plain mean of the workers' weights."""


class DiLoCo(Method):
    """Every ``every`` steps all workers go on from one point: where the outer optimizer takes the last one.

    Between two meetings the workers' weights differ. Connections may move meanwhile only if they move alike on all workers; where
    they did not, the next meeting refuses.

    Args:
        exchange: such as a `Channel`; what travels is how far the weights went since the last meeting, times minus one.
        every: steps from one meeting to the next.
        outer: makes the outer optimizer of a list of parameters.

    >>> from noctule.channel import Channel
    >>> from noctule.exchange import Local
    >>> method = DiLoCo(Channel(path=Local.together(1)[0]), every=100, outer=AVERAGE)
    """

    def __init__(
        self, exchange: Exchange, *, every: int, outer: Callable[[list[nn.Parameter]], Optimizer] = NESTEROV
    ) -> None:
        """Nothing is sent yet."""
        if every < 1:
            raise ValueError(f"workers meet after at least one step, got every={every}")
        self.exchange, self.every, self.outer = exchange, every, outer
        self.steps = self.met = 0
        """How many are done, and how many were when the workers last met."""

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Note where the worker begins."""
        self.model = model
        self._hook = model.register_forward_pre_hook(self._before_forward)
        self.anchors = {name: nn.Parameter(p.detach().clone()) for name, p in self._parameters().items()}
        self.optimizer = self.outer(list(self.anchors.values()))
        self._moved = self._agreed = False

    def after_step(self) -> None:
        """Meet, when it is time."""
        self.steps += 1
        self._meet_if_due()

    def now(self) -> None:
        """Meet, whether it is time or not; all workers must.

        Raises:
            ExchangeError: they began with different models, or connections moved differently; LostWorkerError where one is gone.
        """
        if not self._agreed:
            agree(self.exchange, self.model, {"exchange": self.exchange, "every": self.every}, weights=self.anchors)
            self._agreed = True
        if self._moved:
            agree_on_places(self.exchange, self.model)
            self._moved = False
        parameters = self._parameters()
        with torch.no_grad():
            gone = [self.anchors[name] - p for name, p in parameters.items()]
            for name, total in zip(parameters, self.exchange(gone, list(parameters)), strict=True):
                self.anchors[name].grad = total
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for name, p in parameters.items():
                p.copy_(self.anchors[name])
        self.met = self.steps

    def settle(self) -> None:
        """Meet, where there were steps since the last time; the later meetings come when they would have come."""
        if self.steps > self.met:
            self.now()

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Anchors, outer momenta and what is owed follow their connections; a new one begins at its first value."""
        prefix = next(name for name, module in self.model.named_modules() if module is layer)
        for name, p in layer.named_parameters(recurse=False):
            part, key = remap.of(name), f"{prefix}.{name}" if prefix else name
            if part is not None and key in self.anchors:
                old = self.anchors[key]
                moved = part.apply(old.detach().flatten(), new=p.detach().flatten()).view(p.shape)
                self.anchors[key] = nn.Parameter(moved)
                carry_state(self.optimizer, old, self.anchors[key], part)
                self.exchange.remapped(key, part, tuple(p.shape))
        self._moved = True

    def end(self) -> None:
        """Stop listening."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The last meeting point, the outer optimizer's and the exchange's states."""
        return {
            "steps": self.steps,
            "met": self.met,
            "anchors": {name: anchor.detach() for name, anchor in self.anchors.items()},
            "outer": self.optimizer.state_dict(),
            "exchange": self.exchange.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it is of another model.
        """
        found: dict[str, Tensor] = state["anchors"]
        if {n: x.shape for n, x in found.items()} != {n: x.shape for n, x in self.anchors.items()}:
            raise ValueError(
                "this state is of a model with other parameters or shapes: load the model's own state before the session's"
            )
        with torch.no_grad():
            for name, anchor in self.anchors.items():
                anchor.copy_(found[name])
        self.optimizer.load_state_dict(state["outer"])
        self.exchange.load_state_dict(state["exchange"])
        self.steps, self.met = int(state["steps"]), int(state["met"])
        self._agreed = False

    def _before_forward(self, model: nn.Module, inputs: object) -> None:
        """A meeting that failed, as when a worker was lost, is made up for before the next step."""
        if model.training:
            self._meet_if_due()

    def _meet_if_due(self) -> None:
        if self.steps // self.every * self.every > self.met:
            self.now()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
