"""The team of a worker of Sandblaster: a step of L-BFGS on many batches, of which each worker computes as many as it can."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.errors import UsageError
from noctule.core.method import Method
from noctule.core.random import generator
from noctule.data import Batches
from noctule.exchange.group import TRAFFIC
from noctule.parallel import Sandblaster
from noctule.sparse.rewire import Rewire
from noctule.team.journal import TeamJournal
from noctule.team.member import Team
from noctule.train.fit import Journal, Loss, Source
from noctule.transport.ticket import Ticket


class Portioned(Protocol):
    """How a step is cut: the strategy."""

    @property
    def batches(self) -> int:
        """How many of the recipe's batches are in one step; 0 for an epoch."""
        ...


class SandblasterTeam(Team):
    """A worker of a Sandblaster coordinator; restarted, it catches up with the others' steps at once.

    Connections stay where they are: the history of L-BFGS is of the weights that there are.

    Args:
        ticket: of the coordinator.
        world: how many workers there are.
        strategy: how they train.
        timeout_seconds: for any one answer of the coordinator.
    """

    alone = one_machine = many_models = False

    def __init__(self, ticket: Ticket, *, world: int, strategy: Portioned, timeout_seconds: float) -> None:
        self.rank, self.world = ticket.worker, world
        self.ticket, self.strategy, self.timeout_seconds = ticket, strategy, timeout_seconds
        self._shared: LargeBatches | None = None

    @override
    def share(self, batches: Batches, *, loss_fn: Loss | None = None) -> Source:
        if loss_fn is None:
            raise UsageError(
                "sandblaster computes the loss of many batches in a step, and this recipe does not say which loss that is: use "
                "team().share(batches, loss_fn=...)"
            )
        self._shared = LargeBatches(batches, self.strategy.batches or len(batches), loss_fn)
        return self._shared

    @override
    def methods(self, *, steps: int) -> Sequence[Method]:
        assert self._shared is not None  # `share` comes first
        return (LargeBatchStep(self.ticket, self._shared, timeout_seconds=self.timeout_seconds),)

    @override
    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        return ()

    @override
    def journal(self, journal: Journal, *, steps: int) -> Journal:
        return TeamJournal(journal, self, journal.checkpoints)


class LargeBatches:
    """Steps of several batches; a loop sees the first batch of each.

    Args:
        batches: of the recipe.
        portions: how many of them are in one step.
        loss_fn: of outputs and targets, a mean over samples.
    """

    def __init__(self, batches: Batches, portions: int, loss_fn: Loss) -> None:
        self.batches, self.portions, self.loss_fn = batches, min(portions, len(batches)), loss_fn
        self.now: list[tuple[Tensor, Tensor]] = []
        """The batches of the step that the loop is at."""

    def __len__(self) -> int:
        """The number of steps in an epoch; batches that are left over are in none."""
        return len(self.batches) // self.portions

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The first batch of each step of an epoch, from step ``start`` on."""
        found = self.batches.epoch(epoch, start * self.portions)
        for _ in range(start, len(self)):
            self.now = list(islice(found, self.portions))
            yield self.now[0]


class LargeBatchStep(Method):
    """Takes a step of L-BFGS with the other workers in place of the loop's optimizer, which gets no gradients.

    Weight decay of the loop's optimizer is left out with it. Dropout draws from the step and the batch, alike on all workers.

    Args:
        ticket: of the coordinator.
        source: the batches of each step.
        timeout_seconds: for any one answer of the coordinator.
    """

    def __init__(self, ticket: Ticket, source: LargeBatches, *, timeout_seconds: float) -> None:
        self.ticket, self.source, self.timeout_seconds = ticket, source, timeout_seconds
        self.steps = 0

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        portions, timeout_seconds = self.source.portions, self.timeout_seconds
        named = self.parameters.items()
        self._lbfgs = Sandblaster(named, self.ticket, portions=portions, timeout_seconds=timeout_seconds)
        self._lbfgs.param_groups[0]["steps"] = self.steps

    @override
    def before_step(self) -> None:
        samples = sum(len(targets) for _, targets in self.source.now)

        def closure(portion: int) -> Tensor:
            inputs, targets = self.source.now[portion]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator("sandblaster", self.steps, portion).initial_seed())
                loss = self.source.loss_fn(self.model(inputs), targets) * (len(targets) / samples)
                loss.backward()
            TRAFFIC.sent_bytes += sum(p.nbytes for p in self.parameters.values())
            return loss

        self._lbfgs.step(closure)
        self._lbfgs.zero_grad(set_to_none=True)
        self.steps += 1

    @override
    def end(self) -> None:
        self._lbfgs.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = self._lbfgs.param_groups[0]["steps"] = int(state["steps"])
