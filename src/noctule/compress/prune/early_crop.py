"""EarlyCroP: prune once, early, when the weights have begun to move as a linear model's would.

Rachwan and others 2022 (ICML), "Winning the Lottery Ahead of Time: Efficient Early Network Pruning", arXiv 2206.10451. The moment:
d is the distance of the weights from those after the first epoch, over the norm of these; it prunes once d changes less from one
epoch to the next than its first value times the density. The score: |w (H g)|, what a weight does for the flow of the gradient;
the largest stay, by one threshold over all layers, in a few rounds that halve the distance to the goal.

Differs from the authors' code: it is given training batches (theirs takes the test loader); the training just goes on, where theirs
begins a one-cycle schedule of all epochs (begin the rate anew at `pruned_at`: at a spent one the weights left learn little); up
to 102 rounds there, as many as make a difference here (at 10 %, 100 gave the accuracy of 10 to 0.01 points). Connections only:
the authors' threshold for neurons is negative above a sparsity of 90 %, and would never be met.
"""

from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule.compress.prune.pattern import Globally, Pattern
from noctule.compress.prune.pruning import Pruning
from noctule.sparse.budget import check_density


class EarlyCroP(Pruning):
    """Removes connections once, at the end of the first epoch in which the distance to the early weights has settled.

    Args:
        density: that stays, in (0, 1].
        loss_fn: of outputs and targets, the one that is trained with.
        batches: training batches, (inputs, targets) each, that the score is taken over; five in the paper.
        every: steps of an epoch, from one look at the weights to the next.
        latest: it prunes after this step if it has not before (None: the moment alone decides).
        rounds: of scoring and pruning, all after the same step.
        pattern: which connections stay, given the scores.
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
        rounds: int = 10,
        pattern: Pattern | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        check_density(density)
        if not callable(loss_fn):
            raise ValueError(
                "EarlyCroP scores by second derivatives of the loss, so it needs loss_fn=, such as F.cross_entropy; got "
                f"{loss_fn!r}"
            )
        if every < 1 or rounds < 1 or (latest is not None and latest < 1):
            raise ValueError(f"every, rounds and latest must be at least 1, got {every}, {rounds} and {latest}")
        super().__init__(skip)
        self.density, self.loss_fn, self.batches = density, loss_fn, list(batches)
        if not self.batches:
            raise ValueError("EarlyCroP needs training batches=, (inputs, targets) each: a few are enough")
        self.every, self.latest, self.rounds = every, latest, rounds
        self.pattern: Pattern = Globally() if pattern is None else pattern
        self.pruned_at: int | None = None
        """The number of steps after which it pruned."""
        self.distances: list[float] = []
        """d after each epoch but the first."""
        self._first: dict[str, Tensor] = {}

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
        for each in range(1, self.rounds + 1):
            left = 1.0 - sparsity + (sparsity - begin) * 0.5**each if each < self.rounds else self.density
            names = [*self.layers]
            scores = gradient_flow(self._model, self, self.loss_fn, self.batches)
            candidates = [self.candidates(name, s) for name, s in zip(names, scores, strict=True)]
            self.keep_(dict(zip(names, self.pattern(candidates, left), strict=True)))
        self.pruned_at, self._first = self.steps, {}


def gradient_flow(
    model: nn.Module,
    pruning: Pruning,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """|w (H g)| of each layer's weight, g the gradient and H the Hessian, both summed over the batches in evaluation mode."""
    names = [*pruning.layers]
    weights = [pruning.weight(name) for name in names]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
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
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [(w.detach() * c).abs() for w, c in zip(weights, curved, strict=True)]
