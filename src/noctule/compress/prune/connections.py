"""Which connections of a model exist, and how they are taken away: from dense layers by masks, from sparse ones for good.

Shapes: O rows and I columns of a weight as a matrix, N connections.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.compress.prune.pattern import Candidates, Pattern
from noctule.compress.prune.score import Score
from noctule.core.optim import carry_state, check_carry, unwrapped
from noctule.core.remap import Remap, exchange
from noctule.sparse.layers import SparseLayer

DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Dense layers with a weight of (O, ...)."""


class Kept(NamedTuple):
    """What is left of a layer."""

    weights: int
    places: int
    sparse: bool
    """True: only these weights are stored and computed; False: a dense layer with zeros under a mask, which saves nothing yet."""

    @property
    def density(self) -> float:
        """Weights over places."""
        return self.weights / self.places if self.places else 1.0


class Connections:
    """The connections of a model's linear layers and convolutions, dense and sparse ones.

    A dense layer has a mask. Its gradient is masked before each step and its weight after it, so whatever the optimizer keeps, no
    weight comes back. A sparse layer gets a topology without the places, and the optimizer's state follows.

    Args:
        skip: names of layers that are left alone.
    """

    def __init__(self, skip: Sequence[str] = ()) -> None:
        self.skip = tuple(skip)
        self.layers: dict[str, Any] = {}
        self.left: dict[str, str] = {}
        """Name of a layer that is left alone -> why."""
        self._gone: dict[str, Tensor] = {}  # of dense layers: True where there is no connection
        self._optimizers: list[Optimizer] = []

    def begin(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Find the layers; masks of an earlier session stay.

        Raises:
            ValueError: there is none, ``skip`` names another, or the state of an optimizer cannot follow a sparse layer.
        """
        found, left, seen = {}, {}, set[int]()
        for name, layer in model.named_modules():
            if not isinstance(layer, (*DENSE, SparseLayer)):
                continue
            reason = "skip= names it" if name in self.skip else _obstacle(layer, seen)
            (found if reason is None else left)[name] = layer if reason is None else reason
        if unknown := set(self.skip) - {*found, *left}:
            raise ValueError(f"skip names no layer: {sorted(unknown)}; there are {sorted({*found, *left})}")
        if not found:
            reasons = "; ".join(f"{name or '(model)'}: {why}" for name, why in left.items())
            raise ValueError(f"there is no layer to prune: {reasons or 'the model has no linear layer or convolution'}")
        gone = {}
        for name, layer in found.items():
            if isinstance(layer, SparseLayer):
                layer.check_remap(layer.topology, Remap.between(layer.topology, layer.topology))  # refuse now
                continue
            mask = self._gone.get(name)
            fresh = mask is None or mask.shape != layer.weight.shape
            gone[name] = torch.zeros_like(layer.weight, dtype=torch.bool) if fresh else mask.to(layer.weight.device)
        self.layers, self.left, self._gone = found, left, gone
        self._optimizers = [inner for given in optimizers for inner in unwrapped(given)]

    def end(self) -> None:
        """Let go of the optimizers; masks stay."""
        self._optimizers = []

    def weight(self, name: str) -> nn.Parameter:
        """The weight of a dense layer, or the values (N,) of a sparse one."""
        layer = self.layers[name]
        return layer.values if isinstance(layer, SparseLayer) else layer.weight

    def stored(self, name: str, x: Tensor) -> Tensor:
        """Of numbers in the shape of the weight those of the connections, (N,)."""
        return x.flatten() if isinstance(self.layers[name], SparseLayer) else x[~self._gone[name]]

    def weights(self, name: str) -> int:
        """N."""
        layer = self.layers[name]
        if isinstance(layer, SparseLayer):
            return layer.weights
        return layer.weight.numel() - int(self._gone[name].sum())

    def candidates(self, name: str, scores: Tensor) -> Candidates:
        """The connections of a layer with scores in the shape of its weight.

        Raises:
            ValueError: a score is not finite.
        """
        layer, scores = self.layers[name], self.stored(name, scores.detach())
        if not scores.isfinite().all():
            raise ValueError(f"the scores of {name} are not finite: its weights or gradients have diverged")
        if isinstance(layer, SparseLayer):
            return Candidates(tuple(layer.weight.shape), layer.topology.keys(), scores)
        return Candidates(tuple(layer.weight.shape), (~self._gone[name]).flatten().nonzero()[:, 0], scores)

    def prune_(self, pattern: Pattern, density: float, score: Score, names: Sequence[str] | None = None) -> None:
        """Take away what the pattern does not keep, of all layers or some."""
        names = [*self.layers] if names is None else names
        weights = [self.weight(name) for name in names]
        scored = [
            self.candidates(name, score(w.detach(), w.grad)) for name, w in zip(names, weights, strict=True)
        ]
        self.keep_(dict(zip(names, pattern(scored, density), strict=True)))

    @torch.no_grad()
    def keep_(self, stays: Mapping[str, Tensor]) -> None:
        """Keep only these connections: masks (N,) by name."""
        for name, mask in stays.items():
            layer = self.layers[name]
            if mask.all():
                continue
            if isinstance(layer, SparseLayer):
                dropped, none = (~mask).nonzero()[:, 0], layer.topology.keys()[:0]
                layer.remap_(*exchange(layer.topology, dropped, none))
            else:
                gone = self._gone[name]
                gone[~gone] = ~mask
                layer.weight.masked_fill_(gone, 0.0)

    @torch.no_grad()
    def grow_(self, name: str) -> None:
        """Bring all connections of a layer back, from zero and with neutral optimizer state."""
        layer = self.layers[name]
        if isinstance(layer, SparseLayer):
            absent = layer.topology.places - layer.topology.size
            none = layer.topology.keys()[:0]
            layer.remap_(*exchange(layer.topology, none, layer.topology.missing(absent).to(none.device)))
            return
        gone = self._gone[name].flatten()
        remap = Remap(torch.where(gone, -1, torch.arange(gone.numel(), device=gone.device)), gone.numel())
        carry_state(self._optimizers, layer.weight, layer.weight, remap)
        gone.zero_()

    def check_growing(self) -> None:
        """Raise ValueError where an optimizer's state cannot follow `grow_`."""
        for name in self._gone:
            check_carry(self._optimizers, self.layers[name].weight)

    @torch.no_grad()
    def hold_gradients_(self) -> None:
        """Before a step: no gradient where there is no connection."""
        for name, gone in self._gone.items():
            gradient = self.layers[name].weight.grad
            if gradient is not None:
                gradient.masked_fill_(gone, 0.0)

    @torch.no_grad()
    def hold_(self) -> None:
        """After a step: no weight where there is no connection."""
        for name, gone in self._gone.items():
            self.layers[name].weight.masked_fill_(gone, 0.0)

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Follow a dense layer that changed its width."""
        for name, gone in self._gone.items():
            if self.layers[name] is layer:
                self._gone[name] = remap.apply(gone.flatten(), new=False).view_as(layer.weight)  # type: ignore[arg-type]

    def report(self) -> dict[str, Kept]:
        """What is left of each layer, and whether it is truly sparse or masked."""
        return {
            name: Kept(self.weights(name), self.weight(name).numel(), False)
            if name in self._gone
            else Kept(layer.weights, layer.topology.places, True)
            for name, layer in self.layers.items()
        }

    @property
    def density(self) -> float:
        """Weights over places, of all layers together."""
        kept = self.report().values()
        return sum(k.weights for k in kept) / max(sum(k.places for k in kept), 1)

    def state_dict(self) -> dict[str, Any]:
        """The masks, (True: no connection); the places of sparse layers are the model's own state."""
        return {name: gone.clone() for name, gone in self._gone.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the mask of a layer that is sparse now is not needed.

        Raises:
            ValueError: the masks are not those of this model.
        """
        for name, layer in self._dense():
            if name not in state or state[name].shape != layer.weight.shape:
                shape = tuple(state[name].shape) if name in state else "no mask"
                raise ValueError(
                    f"the state has {shape} for the dense layer {name} of shape {tuple(layer.weight.shape)}: load it into the "
                    "model that it was saved with"
                )
        self._gone = {name: state[name].to(layer.weight.device, torch.bool, copy=True) for name, layer in self._dense()}

    def _dense(self) -> Iterator[tuple[str, Any]]:
        return ((name, layer) for name, layer in self.layers.items() if not isinstance(layer, SparseLayer))


def _obstacle(layer: nn.Module, seen: set[int]) -> str | None:
    """Why a layer is left alone, or None."""
    own = dict(layer.named_parameters(recurse=False))
    weight = own.get("values" if isinstance(layer, SparseLayer) else "weight")
    if weight is None:
        return "its weight is computed from other parameters (parametrize, weight_norm, prune)"
    if hasattr(weight, "placements"):
        return "its weight is sharded over several workers"
    if not weight.requires_grad:
        return "it is frozen"
    if id(weight) in seen:
        return "its weight is that of another layer too"
    seen.add(id(weight))
    return None
