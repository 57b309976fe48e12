"""What all methods that remove connections are: masks for dense layers, topologies that lose places for sparse ones.

Shapes: O rows and I columns of a weight as a matrix, N connections.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.prune.pattern import Candidates, Pattern
from noctule.compress.prune.score import Score
from noctule.core.method import Method
from noctule.core.optim import carry_state, unwrapped
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


class Pruning(Method):
    """A method that removes connections of linear layers and convolutions, dense and sparse ones; the kinds are final classes.

    A dense layer has a mask. Its gradient is masked before each step and its weight after it, so whatever the optimizer keeps, no
    weight comes back. A sparse layer gets a topology without the places, and the optimizer's state follows. A kind says in `act`
    what happens after a step, and names the attributes that resuming needs.

    Args:
        skip: names of layers that are left alone.
    """

    plain: ClassVar[tuple[str, ...]] = ()
    """Attributes that are numbers, None or lists of numbers."""
    shaped: ClassVar[Mapping[str, float]] = {}
    """Attributes that hold tensors in the shape of a layer's weight by its name -> what they are for a new connection."""

    def __init__(self, skip: Sequence[str]) -> None:
        self.skip = tuple(skip)
        self.steps = 0
        self.layers: dict[str, Any] = {}
        self.left: dict[str, str] = {}
        """Name of a layer that is left alone -> why."""
        self._gone: dict[str, Tensor] = {}  # of dense layers: True where there is no connection
        self._optimizers: list[Optimizer] = []
        self._model: nn.Module | None = None

    @abstractmethod
    def act(self) -> None:
        """Remove what is to go after ``steps`` steps."""

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Find the layers; masks of an earlier session stay.

        Raises:
            ValueError: there is none, ``skip`` names another, or the state of an optimizer cannot follow a sparse layer.
        """
        found, left, seen = {}, {}, set[int]()
        for name, layer in model.named_modules():
            if isinstance(layer, (*DENSE, SparseLayer)):
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
            if mask is None or mask.shape != layer.weight.shape:
                mask = torch.zeros_like(layer.weight, dtype=torch.bool)
            gone[name] = mask.to(layer.weight.device)
        self.layers, self.left, self._gone = found, left, gone
        self._optimizers = [inner for given in optimizers for inner in unwrapped(given)]
        self._model = model

    @torch.no_grad()
    @override
    def before_step(self) -> None:
        for name, gone in self._gone.items():
            gradient = self.layers[name].weight.grad
            if gradient is not None:
                gradient.masked_fill_(gone, 0.0)

    @torch.no_grad()
    @override
    def after_step(self) -> None:
        self.steps += 1
        for name, gone in self._gone.items():
            self.layers[name].weight.masked_fill_(gone, 0.0)
        self.act()

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        if (part := remap.of("values" if isinstance(layer, SparseLayer) else "weight")) is None:
            return
        for attribute, new in {"_gone": False, **self.shaped}.items():
            kept = getattr(self, attribute)
            for name, x in kept.items():
                if self.layers[name] is layer:
                    kept[name] = part.apply(x.flatten(), new=new).view_as(self.weight(name))

    @override
    def end(self) -> None:
        self._optimizers, self._model = [], None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Steps, masks (True: no connection) and what the kind names; the places of sparse layers are the model's own state."""
        plain = {key: deepcopy(getattr(self, key)) for key in ("steps", *self.plain)}
        shaped = {key: {name: x.clone() for name, x in getattr(self, key).items()} for key in self.shaped}
        return plain | shaped | {"masks": {name: gone.clone() for name, gone in self._gone.items()}}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        masks = state["masks"]
        for name in self._gone:
            wanted, given = tuple(self.layers[name].weight.shape), tuple(masks[name].shape) if name in masks else None
            if given != wanted:
                raise ValueError(
                    f"the state has {f'a mask of shape {given}' if given else 'no mask'} for the dense layer {name} of shape "
                    f"{wanted}: load it into the model that it was saved with"
                )
        self._gone = {name: masks[name].to(gone.device, copy=True) for name, gone in self._gone.items()}
        for key in ("steps", *self.plain):
            setattr(self, key, deepcopy(state[key]))
        for key in self.shaped:
            setattr(self, key, {name: x.clone() for name, x in state[key].items()})

    def report(self) -> dict[str, Kept]:
        """What is left of each layer, and whether it is truly sparse or masked."""
        return {
            name: Kept(self.weights(name), self.weight(name).numel(), False)
            if name in self._gone
            else Kept(layer.weights, layer.topology.places, True)
            for name, layer in self.layers.items()
        }

    # -- for the kinds --------------------------------------------------------------------------------------------

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
        shape = tuple(layer.weight.shape)
        if isinstance(layer, SparseLayer):
            return Candidates(shape, layer.topology.keys(), scores)
        return Candidates(shape, (~self._gone[name]).flatten().nonzero()[:, 0], scores)

    def prune_(self, pattern: Pattern, density: float, score: Score, spare: Collection[str] = ()) -> None:
        """Take away what the pattern does not keep of all layers, but nothing of those to spare.

        It sees these too: a threshold over the other layers alone would share out their density anew in each turn (with GaP 0.8
        points of accuracy less at 10 %, 1.8 at 2 %).
        """
        weights = {name: self.weight(name) for name in self.layers}
        scored = [self.candidates(name, score(w.detach(), w.grad)) for name, w in weights.items()]
        stays = zip(weights, pattern(scored, density), strict=True)
        self.keep_({name: mask for name, mask in stays if name not in spare})

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
