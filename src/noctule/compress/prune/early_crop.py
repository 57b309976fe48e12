"""EarlyCroP: prune once, early, when the weights have begun to move as a linear model's would.

Rachwan and others 2022 (ICML), "Winning the Lottery Ahead of Time: Efficient Early Network Pruning", arXiv 2206.10451. The moment:
d is the distance of the weights from those after the first epoch, over the norm of these; it prunes once d changes less from one
epoch to the next than its first value times the density. The score: |w (H g)|, what a weight does for the flow of the gradient;
the largest stay, by one threshold over all layers, in a few rounds that halve the distance to the goal.

Differs from the authors' code: it is given training batches (theirs takes the test loader); the training just goes on, where theirs
begins a one-cycle schedule of all epochs (begin the rate anew at `pruned_at`: at a spent one the weights left learn little); up
to 102 rounds there, as many as make a difference here (at 10 %, 100 gave the accuracy of 10 to 0.01 points). Neurons and channels
are scored by the sum of w (H g) over what leads into them, which is a gate on their output; the moment is that of connections,
since the authors' threshold for neurons is negative above a sparsity of 90 %, and would never be met.
"""

from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.prune.pattern import Globally, Pattern
from noctule.compress.prune.pruning import Pruning
from noctule.compress.shrink.following import Following
from noctule.compress.shrink.groups import Group, least, over_weights
from noctule.core.evaluating import evaluating
from noctule.sparse.budget import check_density


class EarlyCroP(Pruning):
    """Removes connections or neurons once, at the end of the first epoch in which the distance to the early weights has settled.

    Args:
        density: share of the connections, or of the neurons, that stays, in (0, 1].
        loss_fn: of outputs and targets, the one that is trained with.
        batches: training batches, (inputs, targets) each, that the score is taken over; five in the paper.
        every: steps of an epoch, from one look at the weights to the next.
        latest: it prunes after this step if it has not before (None: the moment alone decides).
        rounds: of scoring and pruning, all after the same step (None: 10 for connections, 1 for neurons).
        pattern: which connections stay, given the scores.
        example: arguments of the model's forward: given, neurons, channels and heads go for good, as by `shrink`.
        skip: names of layers that are left alone.
    """

    plain = ("pruned_at", "distances")
    shaped = MappingProxyType({"_first": 0.0})

    def __init__(
        self,
        *,
        density: float,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        batches: Iterable[tuple[Tensor, Tensor]] = (),
        every: int,
        latest: int | None = None,
        rounds: int | None = None,
        pattern: Pattern | None = None,
        example: Any = None,
        skip: Sequence[str] = (),
    ) -> None:
        check_density(density)
        if not callable(loss_fn):
            raise ValueError(
                "EarlyCroP scores by second derivatives of the loss, so it needs loss_fn=, such as F.cross_entropy; got "
                f"{loss_fn!r}"
            )
        if any(number is not None and number < 1 for number in (every, rounds, latest)):
            raise ValueError(f"every, rounds and latest must be at least 1, got {every}, {rounds} and {latest}")
        if pattern is not None and example is not None:
            raise ValueError("give pattern= for connections, or example= for neurons, not both")
        super().__init__(skip)
        self.density, self.loss_fn, self.batches = density, loss_fn, list(batches)
        if not self.batches:
            raise ValueError("EarlyCroP needs training batches=, (inputs, targets) each: a few are enough")
        self.every, self.latest, self.example = every, latest, example
        self.rounds = rounds or (10 if example is None else 1)
        self.pattern: Pattern = Globally() if pattern is None else pattern
        self.pruned_at: int | None = None
        """The number of steps after which it pruned."""
        self.distances: list[float] = []
        """d after each epoch but the first."""
        self._first: dict[str, Tensor] = {}

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        super().begin(model, optimizers)
        if self.example is not None:
            following = Following(model, self.example)
            if not (units := self._units(following)):
                raise ValueError(f"there is no group of hidden neurons to prune: {following.left}")
            half = {number: torch.arange(group.units) >= (group.units + 1) // 2 for number, group in units.items()}
            following.check(following.removal(half, {}), optimizers)

    @property
    def threshold(self) -> float | None:
        """Below which a change of d is small."""
        return self.distances[0] * self.density if self.distances else None

    @override
    def act(self) -> None:
        if self.pruned_at is not None:
            return
        if self.steps % self.every == 0:
            self._look()
        if self.steps == self.latest or self._settled():
            self._prune()

    @torch.no_grad()
    def _look(self) -> None:
        """At the end of an epoch."""
        weights = {name: self.weight(name) for name in self.layers}
        if not self._first:
            self._first = {name: w.detach().clone() for name, w in weights.items()}
            return
        moved = sum(float((w - self._first[name]).double().pow(2).sum()) for name, w in weights.items())
        norm = sum(float(w.double().pow(2).sum()) for w in self._first.values())
        self.distances.append((moved / norm) ** 0.5 if norm else 0.0)

    def _settled(self) -> bool:
        if self.steps % self.every or len(self.distances) < 2 or self.threshold is None:
            return False
        return abs(self.distances[-1] - self.distances[-2]) < self.threshold

    def _prune(self) -> None:
        sparsity = 1.0 - self.density
        begin = 0.5 if sparsity > 0.5 else sparsity / 2
        assert self._model is not None
        self.pruned_at, self._first, before = self.steps, {}, 1.0
        for each in range(1, self.rounds + 1):
            left = 1.0 - sparsity + (sparsity - begin) * 0.5**each if each < self.rounds else self.density
            if self.example is None:
                self._prune_connections(self._model, left)
            else:
                self._remove_units(self._model, left / before)
            before = left

    def _prune_connections(self, model: nn.Module, left: float) -> None:
        scores = gradient_flow(model, self, self.loss_fn, self.batches)
        candidates = [self.candidates(name, score.abs()) for name, score in scores.items()]
        self.keep_(dict(zip(scores, self.pattern(candidates, left), strict=True)))

    def _remove_units(self, model: nn.Module, left: float) -> None:
        """Keep this share of the units of all groups together, and the best of each group."""
        flow = gradient_flow(model, self, self.loss_fn, self.batches)
        of = {id(self.weight(name)): score for name, score in flow.items()}
        following = Following(model, self.example)
        scores: dict[int, Tensor] = {}
        for number, group in self._units(following).items():
            score = over_weights(model, group, group.producers, lambda p: of.get(id(p), torch.zeros_like(p))).abs()
            if not score.isfinite().all():
                raise ValueError(f"the scores of {group.name} are not finite: its weights or gradients have diverged")
            score[score.argmax()] = torch.inf
            scores[number] = score
        together = torch.cat([*scores.values()])
        gone = least(together, max(len(scores), round(left * together.numel())))
        parts = dict(zip(scores, gone.split([score.numel() for score in scores.values()]), strict=True))
        following.make_(following.removal({number: mask for number, mask in parts.items() if mask.any()}, {}), ())

    def _units(self, following: Following) -> dict[int, Group]:
        """The groups of which units may go, by their numbers."""
        groups = enumerate(following.groups)
        return {number: group for number, group in groups if group.units > 1 and not {*group.layers} & {*self.skip}}


def gradient_flow(
    model: nn.Module,
    pruning: Pruning,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """w (H g) of each layer's weight by name; g the gradient, H the Hessian, both summed over the batches in evaluation mode."""
    names = [*pruning.layers]
    weights = [pruning.weight(name) for name in names]
    with evaluating(model), torch.enable_grad():
        total = [torch.zeros_like(w) for w in weights]
        for inputs, targets in batches:
            gradients = torch.autograd.grad(loss_fn(model(inputs), targets), weights)
            total = [t + g for t, g in zip(total, gradients, strict=True)]
        curved = [torch.zeros_like(w) for w in weights]
        for inputs, targets in batches:
            gradients = torch.autograd.grad(loss_fn(model(inputs), targets), weights, create_graph=True)
            parts = zip(names, total, gradients, strict=True)
            z = sum((pruning.stored(n, t) * pruning.stored(n, g)).sum() for n, t, g in parts)
            assert isinstance(z, Tensor)
            more = torch.autograd.grad(z, weights, allow_unused=True)
            curved = [c if m is None else c + m for c, m in zip(curved, more, strict=True)]
    return {name: w.detach() * c for name, w, c in zip(names, weights, curved, strict=True)}
