"""Train apart, and meet every so many steps: the distance each worker went is a gradient for an outer optimizer.

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

from noctule.core.delivery import before_forward
from noctule.core.exchange import Exchange
from noctule.core.method import Method
from noctule.core.optim import carry_state
from noctule.core.remap import Remap
from noctule.exchange.handshake import agree, agree_on_places
from noctule.parallel.flights import Flight, Flights, check_own_group
from noctule.parallel.fragments import cut, last_turn

NESTEROV = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
"""The outer optimizer of DiLoCo."""
AVERAGE = partial(SGD, lr=1.0)
"""That of local SGD: what comes is the plain mean of the workers' weights."""


class DiLoCo(Method):
    """Every ``every`` steps all workers go on from one point: where the outer optimizer takes the last one.

    Between two meetings the workers' weights differ. Connections may move meanwhile only if they move alike on all workers; where
    they did not, the next meeting refuses.

    Fragments meet in turn, each ``every`` steps after its last time, so what is sent at once is a part of the model. With
    ``overlap`` training goes on while an exchange is under way; what comes of it counts from that step on, however long it took.
    Workers have the same weights then only after `settle` or `now`.

    Args:
        exchange: such as a `Channel`; what travels is how far the weights went since the last meeting, times minus one. With
            ``overlap`` it must be over a process group of its own: ``TwoPhase(own_group())``.
        every: steps from one meeting to the next.
        outer: makes the outer optimizer of a list of parameters.
        fragments: in how many parts the model meets, cut by layers and balanced by bytes.
        overlap: steps from the one after which a worker sends to the one after which it takes what has come; 0 waits at once.
        blend: of its own weights, how much a worker keeps when it takes what has come after ``overlap`` steps: 0 forgets what
            these steps did to the fragment, 1 would forget what the other workers did.

    Raises:
        ValueError: an option is out of its range, or ``overlap`` is to be on the process group of all processes.

    >>> from noctule.core.exchange import Channel
    >>> from noctule.exchange import Local
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
        """Nothing is sent yet."""
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
        """How many are done."""
        self._met = [0] * fragments

    @property
    def met(self) -> int:
        """How many steps were done when the workers last met, with the fragment that waits longest."""
        return min(self._met)

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Note where the worker begins.

        Raises:
            ValueError: the model has fewer layers than fragments.
        """
        self.model = model
        self.anchors = {name: nn.Parameter(p.detach().clone()) for name, p in self._parameters().items()}
        self.optimizer = self.outer(list(self.anchors.values()))
        self._fragment = cut(self.anchors, self.fragments)
        self._flights = Flights(self.exchange)
        self._moved = self._agreed = False
        self._hook = before_forward(model, self._before_forward)

    def after_step(self) -> None:
        """Meet, when it is time."""
        self.steps += 1
        self._meet_if_due()

    def now(self) -> None:
        """Meet with the whole model, whether it is time or not; all workers must.

        Raises:
            ExchangeError: they began with different models, or connections moved differently; LostWorkerError where one is gone.
        """
        self._land(sent_by=self.steps)
        self._meet(range(self.fragments))

    def settle(self) -> None:
        """Meet, where there were steps since the last time; the later meetings come when they would have come."""
        self._land(sent_by=self.steps)
        if late := [fragment for fragment, met in enumerate(self._met) if met < self.steps]:
            self._meet(late)

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Anchors, outer momenta, what is under way or owed follow their connections; a new one begins at its first value."""
        self._flights.wait()
        prefix = next(name for name, module in self.model.named_modules() if module is layer)
        for name, p in layer.named_parameters(recurse=False):
            part, key = remap.of(name), f"{prefix}.{name}" if prefix else name
            if part is not None and key in self.anchors:
                old = self.anchors[key]
                moved = part.apply(old.detach().flatten(), new=p.detach().flatten()).view(p.shape)
                self.anchors[key] = nn.Parameter(moved)
                carry_state(self.optimizer, old, self.anchors[key], part)
                self._flights.remapped(key, part, tuple(p.shape))
                self.exchange.remapped(key, part, tuple(p.shape))
        self._moved = True

    def end(self) -> None:
        """Stop listening; what is under way ends, and is forgotten."""
        self._hook.remove()
        self._flights.close()

    def state_dict(self) -> dict[str, Any]:
        """The last meeting point, the outer optimizer's and the exchange's states; what is under way is waited for, and kept."""
        flights = self._flights.state_dict()
        return {
            "steps": self.steps,
            "met": list(self._met),
            "fragment": dict(self._fragment),
            "flights": flights,
            "anchors": {name: anchor.detach() for name, anchor in self.anchors.items()},
            "outer": self.optimizer.state_dict(),
            "exchange": self.exchange.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it is of another model, or of another number of fragments.
        """
        found: dict[str, Tensor] = state["anchors"]
        if {n: x.shape for n, x in found.items()} != {n: x.shape for n, x in self.anchors.items()}:
            raise ValueError(
                "this state is of a model with other parameters or shapes: load the model's own state before the session's"
            )
        if len(state["met"]) != self.fragments:
            raise ValueError(f"this state is of {len(state['met'])} fragments, got fragments={self.fragments}")
        self._flights.load_state_dict(state["flights"])
        with torch.no_grad():
            for name, anchor in self.anchors.items():
                anchor.copy_(found[name])
        self.optimizer.load_state_dict(state["outer"])
        self.exchange.load_state_dict(state["exchange"])
        self.steps, self._met, self._fragment = int(state["steps"]), list(state["met"]), dict(state["fragment"])
        self._agreed = False

    def _before_forward(self, model: nn.Module, inputs: object) -> None:
        """A meeting that failed, as when a worker was lost, is made up for before the next step."""
        if model.training:
            self._meet_if_due()

    def _meet_if_due(self) -> None:
        self._land(sent_by=self.steps - self.overlap)
        away = {fragment for flight in self._flights for fragment in flight.fragments}
        due = [fragment for fragment in range(self.fragments) if fragment not in away and self._turn(fragment)]
        if due and self.overlap:
            self._flights.add(Flight(self.steps, due, self._gone(due)))
            self._send()
        elif due:
            self._meet(due)

    def _turn(self, fragment: int) -> bool:
        """Whether it has not met since it was to."""
        return last_turn(fragment, self.fragments, every=self.every, steps=self.steps) > self._met[fragment]

    def _meet(self, fragments: Iterable[int]) -> None:
        """Exchange how far these went, and go on from where all are taken; nothing is under way."""
        self._agree()
        gone = self._gone(fragments)
        with torch.no_grad():
            totals = self.exchange(list(gone.values()), list(gone))
        self._go_on(dict(zip(gone, totals, strict=True)), own=0.0)
        for fragment in fragments:
            self._met[fragment] = self.steps

    def _send(self) -> None:
        """What waits to be sent, be it new or because it failed."""
        if self._flights.waiting:
            self._agree()
            self._flights.send()

    def _land(self, *, sent_by: int) -> None:
        """Take what was sent after this step or before, and wait for it where it has not come."""
        self._send()
        for flight in self._flights.take(sent_by=sent_by):
            self._go_on(flight.tensors, own=self.blend if self.steps > flight.step else 0.0)
            for fragment in flight.fragments:
                self._met[fragment] = flight.step

    def _agree(self) -> None:
        """Do all have the same model, and the same connections?"""
        if not self._agreed or self._moved:
            self._flights.receive()  # one thing at a time on the exchange
        if not self._agreed:
            options = {name: getattr(self, name) for name in ("exchange", "every", "overlap", "blend")}
            cuts = {f"{name} in fragment": fragment for name, fragment in self._fragment.items()}
            agree(self.exchange, self.model, {**options, **cuts}, weights=self.anchors)
            self._agreed = True
        if self._moved:
            agree_on_places(self.exchange, self.model)
            self._moved = False

    def _gone(self, fragments: Iterable[int]) -> dict[str, Tensor]:
        """How far the worker went with these since the last meeting, times minus one."""
        which = set(fragments)
        with torch.no_grad():
            parameters = self._parameters().items()
            return {name: self.anchors[name] - p for name, p in parameters if self._fragment[name] in which}

    def _go_on(self, totals: Mapping[str, Tensor], *, own: float) -> None:
        """Take the outer step with what all went, and go to where it leads, or the way there but for the part that is one's own."""
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
