"""The one engine that moves connections: drop some, grow as many, N stays."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.exchange import Exchange
from noctule.core.keys import in_order, slots_of
from noctule.core.method import Method
from noctule.core.random import generator
from noctule.core.remap import Remap
from noctule.core.remap import exchange as exchanged
from noctule.core.schedule import constant
from noctule.core.types import Schedule
from noctule.sparse.layers import SparseLayer
from noctule.sparse.rewire.drop import Drop, smallest
from noctule.sparse.rewire.passes import Passes

_rewired: WeakSet[SparseLayer] = WeakSet()
"""Layers whose connections a `Rewire` moves: a second one would take the first one's watch."""


class Capture(Protocol):
    """What a grower captures of one layer in one step, and its choice of places.

    It is callable, as `Passes` calls it, if it needs the backward passes.
    """

    def choose(self, count: int, taken: Tensor, dropped: Tensor) -> Tensor:
        """Keys of up to ``count`` places to grow, each once: missing ones, or some that are to go and then stay instead.

        Args:
            count: the number of connections that go, or of missing places if that is smaller.
            taken: the sorted keys of all places that hold a weight now.
            dropped: the keys of those among them that are to go, in any order.
        """
        ...


class SharedCapture:
    """The base of a `Capture` of gradients or activations, which differ from worker to worker: takes their mean over all workers.

    All workers must ask for the same means in the same order.
    """

    exchange: Exchange | None = None
    """The exchange between the workers; None where there is one."""
    key = ""
    """The name of what is exchanged."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over all workers."""
        return x if self.exchange is None else self.exchange([x], [self.key])[0]

    def any_worker(self, saw: bool) -> bool:
        """Whether any worker saw a backward pass."""
        return saw if self.exchange is None else bool(self.mean(torch.tensor([float(saw)])) > 0)


class Grow(Protocol):
    """Where new connections go."""

    def __call__(self, layer: SparseLayer, generator: torch.Generator) -> Capture:
        """Begin to capture what is needed of a layer; after the step, the capture is asked to choose."""
        ...


@runtime_checkable
class StatefulGrow(Protocol):
    """What a `Grow` has besides if where it grows depends on more than the step, such as a validation score."""

    def begin(self, layers: Mapping[str, SparseLayer]) -> None:
        """These layers will be rewired: raise ValueError where one of them cannot be."""
        ...

    def observe(self, **metrics: float) -> None:
        """Something was measured, such as a validation loss."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as plain data."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class Rewire(Method):
    """Every so many steps, drops a fraction of each sparse layer's connections and grows as many elsewhere, from zero.

    SET is (smallest, anywhere), RigL (smallest, steepest), GSE (smallest, guided), CTRE (smallest, `MostAlike`). Values and
    the optimizers' state of the survivors move along. It differs from RigL's code in that the step on which connections move
    is an ordinary weight update too: a method cannot veto a step. In a layer with fewer missing places than would be grown,
    fewer move; in a frozen one, or one whose gradient was to be captured and was not, none. A grower may choose a place that was to
    be dropped: it stays.

    Args:
        drop: which connections go.
        grow: where new ones come.
        fraction: of the connections that move, by the number of steps done; a number or a `Schedule`.
        every: steps from one change to the next.
        until: no changes from this step on (None: to the end).
        skip: names of layers that are left alone.
        seed: of the random places.
        exchange: between workers that train one model together: all then grow the same, by the mean of what they captured.
    """

    def __init__(
        self,
        *,
        grow: Grow,
        drop: Drop = smallest,
        fraction: float | Schedule = 0.3,
        every: int = 100,
        until: int | None = None,
        skip: Sequence[str] = (),
        seed: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if isinstance(fraction, int | float) and not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
        self.drop, self.grow, self.every, self.until, self.skip = drop, grow, every, until, tuple(skip)
        self.fraction: Schedule = fraction if callable(fraction) else constant(fraction)
        self.seed, self.exchange = seed, exchange
        self.steps = 0
        self.moved: dict[str, int] = {}
        """Connections moved since the method began, by layer."""
        self._layers: dict[str, SparseLayer] = {}
        self._captures: dict[str, Capture | Passes] = {}

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Find the sparse layers; from now on they are watched in the steps that need it."""
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
        unknown = set(self.skip) - set(layers)
        if unknown:
            raise ValueError(f"skip names no sparse layer: {sorted(unknown)}; there are {sorted(layers)}")
        layers = {name: m for name, m in layers.items() if name not in self.skip}
        if not layers:
            raise ValueError("there is no sparse layer to rewire: convert_ the model with ToSparse first")
        busy = [name for name, m in layers.items() if m in _rewired or m.watch is not None]
        if busy:
            raise ValueError(f"another method already rewires or watches {busy}: attach one Rewire per layer")
        for layer in layers.values():
            layer.check_remap(
                layer.topology, Remap.between(layer.topology, layer.topology)
            )  # refuse now, not at the first move
        if isinstance(self.grow, StatefulGrow):
            self.grow.begin(layers)
        self._check_ranks(next(iter(layers.values())))
        _rewired.update(layers.values())
        self._layers = layers
        self.moved = {name: self.moved.get(name, 0) for name in self._layers}
        self._arm()

    @override
    def before_step(self) -> None:
        for capture in self._captures.values():
            if isinstance(capture, Passes):
                capture.announce()

    @override
    def after_step(self) -> None:
        self.steps += 1
        for name in list(self._captures):
            capture = self._captures.pop(name)
            if isinstance(capture, Passes):
                capture.close()
                capture = capture.final()
            self.moved[name] += self._rewire(self._layers[name], capture)
        self._arm()

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Begin anew for a layer whose places changed while it was being captured."""
        for name in list(self._captures):
            if self._layers[name] is layer:
                self._capture(name)

    @override
    def observe(self, **metrics: float) -> None:
        if isinstance(self.grow, StatefulGrow):
            self.grow.observe(**metrics)

    @override
    def end(self) -> None:
        self._stop_capturing()
        for layer in self._layers.values():
            _rewired.discard(layer)
        self._layers = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Steps done, connections moved and what a `StatefulGrow` keeps; where they are is the layers' own state.

        What was captured in a step is not in it: where another method failed after that step, and the training resumes from a
        state of then, growers that need gradients or activations move nothing in it.
        """
        state: dict[str, Any] = {"steps": self.steps, "moved": dict(self.moved)}
        return state | {"grow": self.grow.state_dict()} if isinstance(self.grow, StatefulGrow) else state

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.moved = int(state["steps"]), {**dict.fromkeys(self._layers, 0), **state["moved"]}
        if isinstance(self.grow, StatefulGrow) and "grow" in state:  # not in that of a training which grew another way
            self.grow.load_state_dict(state["grow"])
        self._arm()

    def _check_ranks(self, layer: SparseLayer) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        capture = self.grow(layer, torch.Generator())
        if several and callable(capture) and (self.exchange is None or not isinstance(capture, SharedCapture)):
            raise RuntimeError(
                "this way to grow looks at gradients or activations, which differ from rank to rank, as the connections would: "
                "with several ranks give Rewire an exchange=, such as a Channel over AllReduce(), if it makes a SharedCapture; "
                "or use set_(seed=...), which draws the same places on all of them"
            )

    def _due(self, step: int) -> bool:
        return step % self.every == 0 and (self.until is None or step < self.until)

    def _arm(self) -> None:
        """Begin to capture in the coming step if connections will move after it."""
        self._stop_capturing()
        for name, layer in self._layers.items():
            if layer.values.requires_grad and self._due(self.steps + 1):
                self._capture(name)

    def _capture(self, name: str) -> None:
        layer, before = self._layers[name], self._captures.pop(name, None)
        if isinstance(before, Passes):
            before.close()

        def make() -> Capture:
            capture = self.grow(layer, generator(self.seed, self.steps, name))
            if isinstance(capture, SharedCapture):
                capture.exchange, capture.key = self.exchange, f"{name} growth"
            return capture

        capture = make()
        self._captures[name] = Passes(layer, make, capture) if callable(capture) else capture

    def _stop_capturing(self) -> None:
        for capture in self._captures.values():
            if isinstance(capture, Passes):
                capture.close()
        self._captures = {}

    @torch.no_grad()
    def _rewire(self, layer: SparseLayer, capture: Capture) -> int:
        old = layer.topology
        fraction = self.fraction(self.steps)
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(
                f"the schedule of Rewire gave the fraction {fraction} at step {self.steps}, it must lie in [0, 1]"
            )
        if old.size == old.places:
            return 0
        dropped = self.drop(layer.values.detach(), fraction)
        keys = old.keys()
        grown = capture.choose(min(dropped.numel(), old.places - old.size), keys, keys[dropped]).to(keys.device)
        dropped, grown = _without_regrown(keys, dropped, grown)
        if not grown.numel():
            return 0
        if grown.numel() < dropped.numel():  # hardly a place is missing: of those that would go, the largest stay
            dropped = dropped[layer.values[dropped].abs().argsort()[: grown.numel()]]
        layer.remap_(*exchanged(old, dropped, grown))
        return grown.numel()


def _without_regrown(keys: Tensor, dropped: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """The slots that go and the keys that come, without the places that are in both."""
    if not grown.numel():
        return dropped, grown
    grown = in_order(grown)
    slot = slots_of(keys, grown)
    again = slot >= 0
    stays = torch.zeros_like(keys, dtype=torch.bool)
    stays[slot[again]] = True
    return dropped[~stays[dropped]], grown[~again]
