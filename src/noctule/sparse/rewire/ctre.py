"""CTRE: grow where the two neurons that a connection would join are active alike.

Atashgahi, Pieterse, Liu, Mocanu, Veldhuis, Pechenizkiy 2022, "A brain-inspired algorithm for training highly sparse neural
networks", Machine Learning, arXiv 1903.07138. Differs from the authors' code: activations are those of the one step before
connections move, all its micro-batches, not of the whole training set; cosines are never a whole matrix in memory, and large
layers look at random candidates only; where too few places are alike at all the rest are random, not dead neurons; new
connections start at zero; what *sim* draws at random was not just dropped.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from noctule.core.topology import Topology
from noctule.sparse.layers import SparseLayer, SparseLinear
from noctule.sparse.rewire.engine import Capture, Rewire, SharedCapture
from noctule.sparse.rewire.rigl import largest
from noctule.sparse.rewire.set import anywhere

EXACT_PLACES = 1 << 24
"""Layers of at most so many places (4096 x 4096) are looked at as a whole by default."""

CANDIDATES = 1 << 22
"""The most random candidates of a layer that is too large to be looked at as a whole."""

Mode = Literal["seq", "sim"]
Activation = Callable[[SparseLayer, Tensor], Tensor]
"""A layer and what it gives (O, B) -> the activations of its neurons (O, B)."""


class MostAlike:
    """A `Grow` that takes the places with the largest |cosine| between the activations of the two neurons they join.

    The activations are the layer's input and its output, without dropout of its own. A neuron that is silent throughout has
    the cosine 0, and a place with the cosine 0 is never preferred to a random one. Connections that are about to be dropped
    compete with the missing ones:

    * *seq*: one that is among the most alike stays. Once the validation score has not risen ``patience`` times in a row,
      growth is random for good. The score is what ``session.observe(validation_accuracy=...)`` or ``validation_loss``
      reports, as `fit` does after every epoch; of both, the accuracy counts.
    * *sim*: one that is among the most alike goes nevertheless, and a random place is taken instead.

    A neuron without incoming connections has a constant activation, which is like every other constant one: let biases start
    at zero in extremely sparse networks, so that such neurons are silent.

    Args:
        mode: seq or sim.
        patience: scores without a new best after which *seq* becomes random.
        exact: look at all places of a layer in O(O I B) time, or at random candidates in O(N B); None: at all in layers of at
            most `EXACT_PLACES`.
        candidates: random missing places looked at for each weight, where not exact (default: 256, but no more than `CANDIDATES` in
            a layer, and at least one). The more, the nearer to the exact form; with few of them new connections spread over more
            neurons, which was better on extremely sparse networks.
        activation: what becomes of a layer's output before it is another one's input, where `FuseEpilogue` did not fold that
            into the layer: ``lambda layer, y: y.relu()``. None: nothing, so the last layer is judged by its logits; with
            ``lambda layer, y: y.softmax(0) if layer is last else y`` by its probabilities, as in the authors' code.
    """

    def __init__(
        self,
        *,
        mode: Mode = "seq",
        patience: int = 40,
        exact: bool | None = None,
        candidates: float | None = None,
        activation: Activation | None = None,
    ) -> None:
        if mode not in ("seq", "sim"):
            raise ValueError(f"mode must be 'seq' or 'sim', got {mode!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 score, got {patience}")
        if candidates is not None and not candidates > 0.0:
            raise ValueError(f"candidates must be above 0 for each weight, got {candidates}")
        self.mode, self.patience, self.exact, self.candidates = mode, patience, exact, candidates
        self.activation = activation
        self.random = False
        """Whether growth is random now."""
        self.best, self.waited, self.metric = -math.inf, 0, ""

    def __call__(self, layer: SparseLayer, generator: torch.Generator) -> Capture:
        """Begin to capture activations; none once growth is random."""
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator, device="cpu")))
        if self.random:
            return anywhere(layer, own)
        exact = layer.topology.places <= EXACT_PLACES if self.exact is None else self.exact
        places = _Everywhere(layer) if exact else _Somewhere(layer, self.candidates, generator)
        return _Alike(self, layer, places, own)

    def begin(self, layers: Mapping[str, SparseLayer]) -> None:
        """Refuse convolutions: a weight of theirs joins many pairs of neurons."""
        others = [name for name, layer in layers.items() if not isinstance(layer, SparseLinear)]
        if others:
            kinds = ", ".join(sorted({type(layers[name]).__name__ for name in others}))
            raise ValueError(f"CTRE grows the connections of SparseLinear only, not of {kinds}: give skip={others}")

    def observe(self, **metrics: float) -> None:
        """Count how often the validation score did not rise."""
        if self.mode == "sim" or self.random:
            return
        self.metric = self.metric or next((name for name in _SIGNS if name in metrics), "")
        if self.metric not in metrics:
            return
        score = _SIGNS[self.metric] * float(metrics[self.metric])
        risen = score > self.best
        self.best, self.waited = (score, 0) if risen else (self.best, self.waited + 1)
        self.random = self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Whether growth is random, the best score and how many scores ago it was."""
        return {"random": self.random, "best": self.best, "waited": self.waited, "metric": self.metric}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.random, self.metric = bool(state["random"]), str(state["metric"])
        self.best, self.waited = float(state["best"]), int(state["waited"])

    def output(self, layer: SparseLayer, x: Tensor) -> Tensor:
        """The activations (O, B) of a layer's neurons, of its input (I, B)."""
        y = layer.respond(x)
        if self.activation is None:
            return y
        activated = self.activation(layer, y)
        if activated.shape != y.shape:
            raise ValueError(
                f"activation must keep the shape (O, B): it made {tuple(activated.shape)} of {tuple(y.shape)}"
            )
        return activated


def ctre(
    *,
    mode: Mode = "seq",
    patience: int = 40,
    exact: bool | None = None,
    candidates: float | None = None,
    activation: Activation | None = None,
    fraction: float = 0.2,
    **options: Any,
) -> Rewire:
    """`Rewire` with `MostAlike` growth; the authors move connections once an epoch: ``every=len(batches)``."""
    grow = MostAlike(mode=mode, patience=patience, exact=exact, candidates=candidates, activation=activation)
    return Rewire(grow=grow, fraction=fraction, **options)


_SIGNS = {"validation_accuracy": 1.0, "validation_loss": -1.0}


class _Alike(SharedCapture):
    """The `Capture`: adds up what the cosines need, at the places that are looked at."""

    def __init__(
        self, grow: MostAlike, layer: SparseLayer, places: "_Everywhere | _Somewhere", generator: torch.Generator
    ) -> None:
        self.grow, self.layer, self.places, self.generator = grow, layer, places, generator
        self.squares: tuple[Tensor, Tensor] | None = None
        """Sums over the batch of the squared activations out (O,) and in (I,)."""

    @torch.no_grad()
    def __call__(self, dy: Tensor, x: Tensor) -> None:
        y_OB, x_IB = _wide(self.grow.output(self.layer, x)), _wide(x)
        self.places.see(y_OB, x_IB)
        squares_O, squares_I = y_OB.square().sum(1), x_IB.square().sum(1)
        if self.squares is not None:
            squares_O, squares_I = squares_O + self.squares[0], squares_I + self.squares[1]
        self.squares = squares_O, squares_I

    def choose(self, count: int, taken: Tensor, dropped: Tensor) -> Tensor:
        if self.grow.random:  # since this capture began
            return anywhere(self.layer, self.generator).choose(count, taken, dropped)
        if not self.any_worker(self.squares is not None):
            return taken.new_empty(0)
        stays = torch.ones_like(taken, dtype=torch.bool)
        stays[torch.searchsorted(taken, dropped)] = False
        sizes = self.layer.topology.shape
        squares = self.squares or tuple(_wide(self.layer.values.new_zeros(size)) for size in sizes)
        over_O, over_I = torch.where((s := self.mean(torch.cat(squares))) > 0, s.rsqrt(), 0.0).split(sizes)
        alike, cosines = self.places.best(count, taken[stays], over_O, over_I, self.mean)
        alike = alike[cosines > 0]
        if self.grow.mode == "sim":
            alike = alike[~torch.isin(alike, dropped)]
        return torch.cat([alike, self._random(count - alike.numel(), taken, alike)])

    def _random(self, count: int, *elsewhere: Tensor) -> Tensor:
        """Random places that are none of these."""
        if not count:
            return elsewhere[0].new_empty(0)
        full = Topology.from_keys(self.layer.topology.shape, torch.cat(elsewhere).unique())
        return full.missing(count, generator=self.generator).to(elsewhere[0].device)


class _Everywhere:
    """All places: activations are kept until the cosines are made, a tile of rows at a time."""

    def __init__(self, layer: SparseLayer) -> None:
        self.layer = layer
        self.passes: list[tuple[Tensor, Tensor]] = []

    def see(self, y_OB: Tensor, x_IB: Tensor) -> None:
        self.passes.append((y_OB, x_IB))

    def best(
        self, count: int, excluded: Tensor, over_O: Tensor, over_I: Tensor, mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys of the places most alike, none of them excluded, and their cosines."""

        def cosines(start: int, stop: int) -> Tensor:
            tiles = (self.layer.gradient_rows(start, stop, y, x) for y, x in self.passes)
            sums = mean(sum(tiles, over_O.new_zeros(stop - start, over_I.numel())))
            return sums.abs() * over_O[start:stop, None] * over_I

        return largest(cosines, self.layer.topology.shape, count, excluded)


class _Somewhere:
    """Random candidates and the layer's own places (some of which will be dropped, and compete): sums are added up at once."""

    def __init__(self, layer: SparseLayer, candidates: float | None, generator: torch.Generator) -> None:
        topology = layer.topology
        count = candidates * topology.size if candidates else max(topology.size, min(256 * topology.size, CANDIDATES))
        missing = topology.missing(math.ceil(count), generator=generator)
        self.layer, self.keys = layer, torch.cat([topology.keys(), missing.to(topology.device)]).sort().values
        self.places = Topology.from_keys(topology.shape, self.keys)
        self.sums: Tensor | None = None

    def see(self, y_OB: Tensor, x_IB: Tensor) -> None:
        sums = self.layer.gradient_at(self.places, y_OB, x_IB)
        self.sums = sums if self.sums is None else self.sums + sums

    def best(
        self, count: int, excluded: Tensor, over_O: Tensor, over_I: Tensor, mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys of the places most alike, none of them excluded, and their cosines."""
        sums = mean(over_O.new_zeros(self.keys.numel()) if self.sums is None else self.sums)
        free = torch.ones_like(self.keys, dtype=torch.bool)
        free[torch.searchsorted(self.keys, excluded)] = False
        keys, in_features = self.keys[free], self.layer.topology.shape[1]
        cosines = sums[free].abs() * over_O[keys // in_features] * over_I[keys % in_features]
        cosines, order = cosines.topk(min(count, keys.numel()))
        return keys[order], cosines


def _wide(x: Tensor) -> Tensor:
    """In at least float32, in which sums over a batch are made."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
