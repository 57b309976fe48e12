"""GaP: scheduled grow-and-prune, in turn a part of the layers is dense and the rest sparse.

Ma and others 2022 (ICLR), "Effective Model Sparsification by Scheduled Grow-and-Prune Methods", arXiv 2106.09857. This is the
sequential form, cyclic over the partitions. Differs from the authors' code: their chain of runs starts optimizer and learning
rate anew in each step, here one training goes on, and a weight that grows has neutral optimizer state. Grown weights start at
zero and a partition grows to full density; their code can also grow to a part, from random values. The first pruning comes
after the first step, not before it.
"""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.prune.pattern import Pattern, PerLayer
from noctule.compress.prune.pruning import Pruning
from noctule.compress.prune.score import Score, magnitude
from noctule.core.optim import check_carry
from noctule.sparse.budget import check_density


class GaP(Pruning):
    """Every so many steps, grows all connections of the next partition of the layers and prunes all other layers.

    After ``rounds`` x ``partitions`` turns all layers are pruned and stay so. Dense layers are masked, as by `Prune`; a sparse
    layer has all its places while it is grown.

    Args:
        density: of the layers that are pruned, in (0, 1].
        every: steps of a turn.
        partitions: into how many parts of neighbouring layers the model is cut.
        rounds: how often each part grows.
        score: importance of each weight.
        pattern: which of them stay.
        skip: names of layers that are left alone.
    """

    def __init__(
        self,
        *,
        density: float,
        every: int,
        partitions: int = 2,
        rounds: int = 3,
        score: Score = magnitude,
        pattern: Pattern | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        check_density(density)
        if min(every, partitions, rounds) < 1:
            raise ValueError(f"every, partitions and rounds must be at least 1, got {every}, {partitions} and {rounds}")
        super().__init__(skip)
        self.density, self.every, self.partitions, self.rounds = density, every, partitions, rounds
        self.score = score
        self.pattern: Pattern = PerLayer() if pattern is None else pattern

    @property
    def until(self) -> int:
        """The number of steps after which all layers are pruned for good."""
        return self.rounds * self.partitions * self.every + 1

    @property
    def parts(self) -> list[list[str]]:
        """The layers of each partition."""
        return cut([*self.layers], self.partitions)

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        super().begin(model, optimizers)
        for name in self.layers:
            check_carry(self._optimizers, self.weight(name))  # what grows needs new state
        cut([*self.layers], self.partitions)

    @override
    def act(self) -> None:
        if self.steps > self.until or (self.steps - 1) % self.every:
            return
        turn = (self.steps - 1) // self.every
        growing = [] if self.steps == self.until else self.parts[turn % self.partitions]
        self.prune_(self.pattern, self.density, self.score, spare=growing)
        for name in growing:
            self.grow_(name)


def cut(layers: Sequence[str], partitions: int) -> list[list[str]]:
    """Parts of neighbouring layers.

    Raises:
        ValueError: there are fewer layers than parts.
    """
    if partitions > len(layers):
        raise ValueError(
            f"{len(layers)} layers cannot be cut into {partitions} partitions: {[*layers]}; have fewer of them"
        )
    return [[*layers[len(layers) * k // partitions : len(layers) * (k + 1) // partitions]] for k in range(partitions)]
