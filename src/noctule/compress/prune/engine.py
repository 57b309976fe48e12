"""The one engine that removes connections on a schedule."""

from collections.abc import Sequence

from typing_extensions import override

from noctule.compress.prune.pattern import Pattern, PerLayer, checked
from noctule.compress.prune.pruning import Pruning
from noctule.compress.prune.score import Score, magnitude
from noctule.core.schedule import constant
from noctule.core.types import Schedule


class Prune(Pruning):
    """Every so many steps, removes the connections with the smallest score, down to the density that a schedule gives.

    Dense layers (`nn.Linear`, ``nn.Conv1d`` to ``nn.Conv3d``) are masked: gradients before and weights after each step, so no
    momentum brings a weight back. Sparse layers lose the places themselves, and the optimizer's state follows. No connection
    returns, whatever the schedule does.

    A masked layer saves nothing. `sparsify_` makes it sparse, state of the optimizers included, between two sessions: a layer that
    became another one inside a session would break what holds its weight by name (averages, exchanges, the best state so far, a
    checkpoint to resume from). The next session may go on with the same object. `report` says which layers are masked.

    Args:
        schedule: the density in (0, 1] by the number of steps done, a number or a `Schedule`, such as
            ``cubic(1.0, end=0.1, steps=1000)``.
        score: importance of each weight, asked after the step.
        pattern: which of them stay.
        every: steps from one removal to the next.
        skip: names of layers that are left alone.

    >>> import torch
    >>> from noctule.core.method import attach
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> optimizer, prune = torch.optim.SGD(model.parameters(), lr=0.1), Prune(schedule=0.25, every=1)
    >>> with attach(model, optimizer, prune):
    ...     model(torch.ones(1, 8)).sum().backward()
    ...     optimizer.step()
    >>> prune.report()
    {'0': Kept(weights=8, places=32, sparse=False), '2': Kept(weights=2, places=8, sparse=False)}
    """

    plain = ("density",)

    def __init__(
        self,
        *,
        schedule: float | Schedule,
        score: Score = magnitude,
        pattern: Pattern | None = None,
        every: int = 100,
        skip: Sequence[str] = (),
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.schedule: Schedule = schedule if callable(schedule) else constant(checked(schedule, 0))
        super().__init__(skip)
        self.score, self.every = score, every
        self.pattern: Pattern = PerLayer() if pattern is None else pattern
        self.density = 1.0
        """What the schedule gave last, where that was the lowest so far."""

    @override
    def act(self) -> None:
        if self.steps % self.every:
            return
        density = checked(self.schedule(self.steps), self.steps)
        if density < self.density:
            self.prune_(self.pattern, density, self.score)
            self.density = density
