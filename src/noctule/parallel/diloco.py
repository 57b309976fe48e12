"""Local training with a meeting every so many steps, where the workers' mean change is a gradient for an outer optimizer.

Douillard et al. 2023, "DiLoCo", arXiv 2311.08105; with an outer ``SGD(lr=1)`` it is local SGD (McMahan et al. 2017, arXiv
1602.05629). In fragments, and overlapped with training: Douillard et al. 2025, "Streaming DiLoCo with overlapping communication",
arXiv 2501.18512. Differs from the papers: what travels goes through any exchange, so it can be compressed, and the inner and outer
optimizers are whatever torch has; fragments are cut by layers of any model, with even bytes, instead of by transformer blocks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from noctule.core.delivery import before_forward
from noctule.core.exchange import Exchange
from noctule.core.method import Method
from noctule.core.optim import carry_state
from noctule.core.remap import Remap
from noctule.exchange.handshake import agree, agree_on_places
from noctule.parallel.fragments import cut, last_due
from noctule.parallel.pending import PendingExchange, PendingExchanges, check_own_group

NESTEROV = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
"""The outer optimizer of DiLoCo."""
AVERAGE = partial(SGD, lr=1.0)
"""The outer optimizer of local SGD: weights become the plain mean of the workers'."""


class DiLoCo(Method):
    """Every ``every`` steps, moves the weights of all workers from the last meeting point to the next by an outer optimizer.

    Between two meetings the workers' weights differ. Connections may move meanwhile only if they move alike on all workers; if
    they did not, the next meeting raises an error.

    Fragments meet in turn, each ``every`` steps after its last time, so what is sent at once is a part of the model. With
    ``overlap`` training goes on during an exchange; its result is used after that number of steps, however long it took. Workers
    have the same weights then only after `settle` or `now`.

    Args:
        exchange: such as a `Channel`, for the change of the weights since the last meeting, times minus one. With ``overlap`` it
            must be over a process group of its own: ``TwoPhase(own_group())``.
        every: the number of steps from one meeting to the next.
        outer: makes the outer optimizer for a list of parameters.
        fragments: the number of parts of the model, cut by layers and balanced by bytes.
        overlap: the number of steps between sending a fragment and using the result; 0 waits at once.
        blend: the share of its own weights that a worker keeps when it uses a result after ``overlap`` steps: 0 would drop what
            these steps did to the fragment, 1 what the other workers did.

    Raises:
        ValueError: an option is out of its range, or ``overlap`` is to be on the process group of all processes.

    >>> from noctule.exchange import Channel, Local
    >>> method = DiLoCo(Channel(path=Local.together(1)[0]), every=100, outer=AVERAGE)
    >>> streaming = DiLoCo(Channel(path=Local.together(1)[0]), every=100, fragments=4, overlap=5)
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        every: int,
        outer: Callable[[list[nn.Parameter]], Optimizer] = NESTEROV,
        fragments: int = 1,
        overlap: int = 0,
        blend: float = 0.5,
    ) -> None:
        if every < 1:
            raise ValueError(f"workers meet after at least one step, got every={every}")
        if not 1 <= fragments <= every:
            raise ValueError(
                f"each fragment has a step of its own, so from 1 to every={every}, got fragments={fragments}"
            )
        if not 0 <= overlap <= every:
            raise ValueError(
                f"what a fragment sent must be back before it meets again: overlap is from 0 to every={every} steps, got {overlap}"
            )
        if not 0.0 <= blend < 1.0:
            raise ValueError(f"a worker keeps a part of its weights, from 0 to less than 1, got blend={blend}")
        if overlap:
            check_own_group(exchange)
        self.exchange, self.every, self.outer = exchange, every, outer
        self.fragments, self.overlap, self.blend = fragments, overlap, blend
        self.steps = 0
        """The number of steps done."""
        self._met = [0] * fragments

    @property
    def met(self) -> int:
        """The number of steps that were done at the last meeting of the fragment whose meeting is longest ago."""
        return min(self._met)

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Keep the weights as the first meeting point.

        Raises:
            ValueError: the model has fewer layers than fragments.
        """
        self.model = model
        self.anchors = {name: nn.Parameter(p.detach().clone()) for name, p in self._parameters().items()}
        self.optimizer = self.outer(list(self.anchors.values()))
        self._fragment = cut(self.anchors, self.fragments)
        self._pending = PendingExchanges(self.exchange)
        self._moved = self._agreed = False
        self._hook = before_forward(model, self._before_forward)

    @override
    def after_step(self) -> None:
        self.steps += 1
        self._meet_if_due()

    def now(self) -> None:
        """Meet with the whole model, whether a meeting is due or not; all workers must call it.

        Raises:
            ExchangeError: they began with different models, or connections moved differently; LostWorkerError where one is gone.
        """
        self._use_arrived(sent_by=self.steps)
        self._meet(range(self.fragments))

    @override
    def settle(self) -> None:
        """Meet with the fragments that have had steps since their last meeting; later meetings stay where they were."""
        self._use_arrived(sent_by=self.steps)
        if late := [fragment for fragment, met in enumerate(self._met) if met < self.steps]:
            self._meet(late)

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Move anchors, outer momenta, pending exchanges and residuals; the anchor of a new connection is its first value."""
        self._pending.wait()
        prefix = next(name for name, module in self.model.named_modules() if module is layer)
        for name, p in layer.named_parameters(recurse=False):
            part, key = remap.of(name), f"{prefix}.{name}" if prefix else name
            if part is not None and key in self.anchors:
                old = self.anchors[key]
                moved = part.apply(old.detach().flatten(), new=p.detach().flatten()).view(p.shape)
                self.anchors[key] = nn.Parameter(moved)
                carry_state(self.optimizer, old, self.anchors[key], part)
                self._pending.remapped(key, part, tuple(p.shape))
                self.exchange.remapped(key, part, tuple(p.shape))
        self._moved = True

    @override
    def end(self) -> None:
        """Remove the hook, and forget pending exchanges once they have ended."""
        self._hook.remove()
        self._pending.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Wait for pending exchanges; the last meeting point, and the states of those, the outer optimizer and the exchange."""
        pending = self._pending.state_dict()
        return {
            "steps": self.steps,
            "met": list(self._met),
            "fragment": dict(self._fragment),
            "flights": pending,
            "anchors": {name: anchor.detach() for name, anchor in self.anchors.items()},
            "outer": self.optimizer.state_dict(),
            "exchange": self.exchange.state_dict(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of another model, or of another number of fragments.
        """
        found: dict[str, Tensor] = state["anchors"]
        if {n: x.shape for n, x in found.items()} != {n: x.shape for n, x in self.anchors.items()}:
            raise ValueError(
                "this state is of a model with other parameters or shapes: load the model's own state before the session's"
            )
        if len(state["met"]) != self.fragments:
            raise ValueError(f"this state is of {len(state['met'])} fragments, got fragments={self.fragments}")
        self._pending.load_state_dict(state["flights"])
        with torch.no_grad():
            for name, anchor in self.anchors.items():
                anchor.copy_(found[name])
        self.optimizer.load_state_dict(state["outer"])
        self.exchange.load_state_dict(state["exchange"])
        self.steps, self._met, self._fragment = int(state["steps"]), list(state["met"]), dict(state["fragment"])
        self._agreed = False

    def _before_forward(self, model: nn.Module, inputs: object) -> None:
        """Retry a meeting that failed, as when a worker was lost, before the next step."""
        if model.training:
            self._meet_if_due()

    def _meet_if_due(self) -> None:
        self._use_arrived(sent_by=self.steps - self.overlap)
        away = {fragment for pending in self._pending for fragment in pending.fragments}
        due = [fragment for fragment in range(self.fragments) if fragment not in away and self._is_due(fragment)]
        if due and self.overlap:
            self._pending.add(PendingExchange(self.steps, due, self._changes(due)))
            self._send()
        elif due:
            self._meet(due)

    def _is_due(self, fragment: int) -> bool:
        """Whether it has not met since its last due step."""
        return last_due(fragment, self.fragments, every=self.every, steps=self.steps) > self._met[fragment]

    def _meet(self, fragments: Iterable[int]) -> None:
        """Exchange the changes of these fragments, and move to the next meeting point; nothing is pending."""
        self._agree()
        changes = self._changes(fragments)
        with torch.no_grad():
            totals = self.exchange(list(changes.values()), list(changes))
        self._step(dict(zip(changes, totals, strict=True)), own=0.0)
        for fragment in fragments:
            self._met[fragment] = self.steps

    def _send(self) -> None:
        """Send what is new or has failed."""
        if self._pending.unsent:
            self._agree()
            self._pending.send()

    def _use_arrived(self, *, sent_by: int) -> None:
        """Use the results of what was sent after this step or before, and wait for those that have not arrived."""
        self._send()
        for pending in self._pending.take(sent_by=sent_by):
            self._step(pending.tensors, own=self.blend if self.steps > pending.step else 0.0)
            for fragment in pending.fragments:
                self._met[fragment] = pending.step

    def _agree(self) -> None:
        """Check that all workers have the same model, options and connections."""
        if not self._agreed or self._moved:
            self._pending.receive()  # the exchange does one thing at a time
        if not self._agreed:
            options = {name: getattr(self, name) for name in ("exchange", "every", "overlap", "blend")}
            cuts = {f"{name} in fragment": fragment for name, fragment in self._fragment.items()}
            agree(self.exchange, self.model, {**options, **cuts}, weights=self.anchors)
            self._agreed = True
        if self._moved:
            agree_on_places(self.exchange, self.model)
            self._moved = False

    def _changes(self, fragments: Iterable[int]) -> dict[str, Tensor]:
        """The changes of these fragments since the last meeting, times minus one."""
        which = set(fragments)
        with torch.no_grad():
            parameters = self._parameters().items()
            return {name: self.anchors[name] - p for name, p in parameters if self._fragment[name] in which}

    def _step(self, totals: Mapping[str, Tensor], *, own: float) -> None:
        """Take the outer step with the mean change, and move the weights there, but for the share ``own`` of this worker's."""
        with torch.no_grad():
            for name, total in totals.items():
                self.anchors[name].grad = total.to(self.anchors[name].device)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for name in totals:
                p, anchor = self.model.get_parameter(name), self.anchors[name]
                p.copy_(torch.lerp(anchor, p, own) if own else anchor)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
