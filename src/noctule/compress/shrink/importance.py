"""Importance pruning: the neurons with the least incoming weight go.

Curci, Mocanu, Pechenizkiy 2021, "Truly Sparse Neural Networks at Scale", arXiv 2102.01732: a neuron's importance is the sum of
its absolute incoming weights; every so many epochs (10, after 200) the neurons of each hidden layer up to a percentile (20) are
pruned. Differs from the authors' code: there the incoming weights are zeroed, and the neuron, its outgoing weights and the width
stay, to be connected again by chance; here both sides and the neuron itself are removed, and the constant that it would go on
giving becomes part of the next layer's bias. There all neurons as important as the last one of the percentile go too; here exactly
so many go. Dense layers and convolutions, whose neurons are channels, are pruned in the same way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.shrink.constants import can_take
from noctule.compress.shrink.following import Following
from noctule.compress.shrink.groups import Score, incoming, taylor
from noctule.compress.shrink.readers import Paths, Reader, find_readers
from noctule.compress.shrink.shrinking import lines_of, shrink
from noctule.compress.shrink.widths import planned, shape_of
from noctule.core.method import Method
from noctule.sparse.layers import SparseLayer


class ImportancePruning(Method):
    """Every so many steps, really removes the neurons of each hidden layer that have the least incoming weight.

    The output layer keeps its neurons; so does a layer whose reader is not known, and `left` says why. With an example any model
    that `torch.export` follows loses channels, and what is tied to them, of each group; heads stay. With a `Rewire` in the same
    session, name this method first: what acts before a step in some order acts after it in reverse, and connections should move
    before the layers that are looked at change their widths, or they do not move in that step.

    To resume, bring the new model to the widths of the checkpoint with `resize_to`, as `fit` does, before it is loaded.

    Args:
        every: steps from one removal to the next.
        percentile: of the neurons of each layer that go each time, in (0, 100).
        start: the first removal comes after this step.
        until: no removal from this step on (None: to the end).
        least: so many neurons stay in every layer.
        skip: names of layers that are left alone.
        paths: which layer reads which, where that is decided in a forward; see `shrink`.
        example: arguments of the model's forward, to find what goes together; see `shrink`.
        score: with an example, says which units go first.
    """

    def __init__(
        self,
        *,
        every: int,
        percentile: float = 20.0,
        start: int = 1,
        until: int | None = None,
        least: int = 1,
        skip: Sequence[str] = (),
        paths: Paths | None = None,
        example: Any = None,
        score: Score = incoming,
    ) -> None:
        if paths is not None and example is not None:
            raise ValueError("give example= or paths=, not both: an example shows what paths would say")
        if every < 1 or start < 1 or least < 1:
            raise ValueError(f"every, start and least must be at least 1, got {every}, {start} and {least}")
        if not 0.0 < percentile < 100.0:
            raise ValueError(f"percentile must lie above 0 and below 100, got {percentile}")
        self.every, self.percentile, self.start, self.until = every, percentile, start, until
        self.least, self.skip, self.paths = least, tuple(skip), dict(paths or {})
        self.example, self.score = example, score
        self.steps = 0
        self.removed: dict[str, int] = {}
        """Neurons removed since the method began, by layer."""
        self.left: dict[str, str] = {}
        """Why other layers keep theirs."""
        self._model: nn.Module | None = None

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Find the hidden layers, and find out now whether all that is kept for them can follow."""
        if self.example is not None:
            self._begin_with_groups(model, optimizers)
            return
        readers, self.left = find_readers(model, self.paths)
        unknown = set(self.skip) - {*readers, *self.left}
        if unknown:
            raise ValueError(
                f"skip names no layer with neurons: {sorted(unknown)}; there are {sorted({*readers, *self.left})}"
            )
        hidden = []
        for name, reader in readers.items():
            if name in self.skip:
                continue
            if (reason := _obstacle(model, name, reader, optimizers)) is None:
                hidden.append(name)
            else:
                self.left[name] = reason
        if not hidden:
            reasons = "; ".join(f"{name or '(model)'}: {why}" for name, why in self.left.items())
            raise ValueError(f"there is no hidden layer to prune: {reasons or 'the model has no layer with neurons'}")
        self._model = model
        self.removed = {name: self.removed.get(name, 0) for name in hidden}

    @override
    def after_step(self) -> None:
        self.steps += 1
        if self.steps < self.start or (self.steps - self.start) % self.every:
            return
        if self.until is not None and self.steps >= self.until:
            return
        assert self._model is not None
        if self.example is not None:
            following = Following(self._model, self.example)
            removal = following.chosen(1.0 - self.percentile / 100, self.score, 1, self._whole(following), self.least)
            following.make_(removal, ())
            for name, count in removal.lost.items():
                self.removed[name] += count
            return
        keep = {name: self._most_important(self._model.get_submodule(name)) for name in self.removed}
        for name, count in shrink(self._model, keep, paths=self.paths).items():
            self.removed[name] += count

    @override
    def end(self) -> None:
        self._model = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Steps done and neurons removed; how many are there is the model's own state."""
        return {"steps": self.steps, "removed": dict(self.removed)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.removed = int(state["steps"]), {**dict.fromkeys(self.removed, 0), **state["removed"]}

    def _begin_with_groups(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        following = Following(model, self.example)
        self.left = dict(following.left)
        whole = self._whole(following)
        hidden = [layer for group in following.groups for layer in group.layers if layer not in whole]
        if not hidden:
            raise ValueError(f"there is no group of hidden layers to prune: {self.left}")
        check = following.chosen(0.5, self.score if self.score is not taylor else incoming, 1, whole, self.least)
        following.check(check, optimizers)
        self._model = model
        self.removed = {name: self.removed.get(name, 0) for name in hidden}

    def _whole(self, following: Following) -> list[str]:
        """Layers whose groups are left alone: those of ``skip``, and those of heads."""
        found = set(self.skip)
        for group in following.groups:
            if any(lines.shape[1] > 1 for member, lines in group.members.items() if member in group.producers):
                found |= set(group.layers)
                self.left |= dict.fromkeys(group.layers, "its features belong to heads, which shrink removes")
        return sorted(found)

    def _most_important(self, layer: nn.Module) -> Tensor:
        """The numbers of the neurons that stay."""
        neurons = shape_of(layer)[0]
        going = max(0, min(int(neurons * self.percentile / 100), neurons - self.least))
        return importance(layer).argsort(stable=True)[going:]


@torch.no_grad()
def importance(layer: Any) -> Tensor:
    """The sum of each neuron's absolute incoming weights, (O,).

    >>> importance(nn.Linear(3, 2)).shape
    torch.Size([2])
    """
    if isinstance(layer, SparseLayer):
        total = torch.zeros(layer.topology.shape[0], dtype=torch.float64, device=layer.values.device)
        return total.index_add_(0, layer.topology.rows(), layer.values.abs().double())
    return layer.weight.flatten(1).abs().sum(1)


def _obstacle(model: nn.Module, name: str, reader: Reader, optimizers: Sequence[Optimizer]) -> str | None:
    """Why a layer cannot lose neurons though its reader is known."""
    layer = model.get_submodule(name)
    if not can_take(layer, reader):
        return f"{reader.name}, which reads it, has no bias to take what a removed neuron gives without its weights"
    try:
        planned(model, lines_of({name: torch.arange(shape_of(layer)[0]) > 0}, {name: reader}), optimizers=optimizers)
    except ValueError as error:
        return str(error)
    return None
