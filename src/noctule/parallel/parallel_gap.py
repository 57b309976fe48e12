"""GaP on several workers: each grows another part of the layers, and all get what the others trained.

Ma and others 2022 (ICLR), "Effective Model Sparsification by Scheduled Grow-and-Prune Methods", arXiv 2106.09857, in its parallel
form. Differs from the authors' code, which trains the parts as separate runs and joins their checkpoints: workers train on, each
with its own optimizer state; biases, norms and other parameters, and the buffers, become the workers' mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.prune import Pattern, PerLayer, Score, magnitude
from noctule.compress.prune.gap import cut
from noctule.compress.prune.pruning import Pruning
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Exchange
from noctule.core.optim import check_carry
from noctule.exchange.handshake import agree
from noctule.parallel.merging import from_bytes, to_bytes
from noctule.sparse.budget import check_density
from noctule.sparse.layers import SparseLayer


class ParallelGaP(Pruning):
    """Every so many steps, takes each layer from the worker that grew it, prunes all layers, and grows this worker's part again.

    After ``rounds`` turns all layers are pruned and the same on all workers. While it trains, a worker has all connections of its
    own part only; at the end of a turn for a moment those of all layers.

    Args:
        exchange: between the workers, such as a `Channel`.
        worker: the rank of this one in the exchange, from 0 on.
        workers: how many there are, and partitions of the layers.
        density: of the layers that are pruned, in (0, 1].
        every: steps of a turn.
        rounds: how many turns.
        score: importance of each weight.
        pattern: which of them stay.
        skip: names of layers that are left alone.

    Raises:
        ValueError: an option is out of its range, or at `attach` there are fewer layers than workers.
        ExchangeError: after a step: workers began differently, or one was lost; nothing was changed then.

    >>> from noctule.exchange import Channel, Local
    >>> method = ParallelGaP(Channel(path=Local.together(1)[0]), worker=0, workers=1, density=0.1, every=1000)
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        worker: int,
        workers: int,
        density: float,
        every: int,
        rounds: int = 3,
        score: Score = magnitude,
        pattern: Pattern | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        check_density(density)
        if min(every, workers, rounds) < 1 or not 0 <= worker < workers:
            raise ValueError(
                f"every, workers and rounds must be at least 1, and worker from 0 to workers - 1; got {every}, {workers}, {rounds} "
                f"and {worker}"
            )
        super().__init__(skip)
        self.exchange, self.worker, self.workers = exchange, worker, workers
        self.density, self.every, self.rounds = density, every, rounds
        self.score = score
        self.pattern: Pattern = PerLayer() if pattern is None else pattern

    @property
    def until(self) -> int:
        """The number of steps after which all layers are pruned for good."""
        return self.rounds * self.every + 1

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        super().begin(model, optimizers)
        for name in self.layers:
            check_carry(self._optimizers, self.weight(name))  # what grows needs new state
        self._parts = cut([*self.layers], self.workers)

    @override
    def act(self) -> None:
        if self.steps > self.until or (self.steps - 1) % self.every:
            return
        assert self._model is not None
        self._join(self._model)
        own = self._parts[self.worker]
        self.prune_(self.pattern, self.density, self.score, spare=own if self.steps == 1 else ())
        if self.steps < self.until:
            for name in own:
                self.grow_(name)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"exchange": self.exchange.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.exchange.load_state_dict(state["exchange"])

    @torch.no_grad()
    def _join(self, model: nn.Module) -> None:
        """The weights of each layer from the worker that grew it, and the mean of all else."""
        grown = self.steps > 1
        if not grown:
            options = {key: getattr(self, key) for key in ("workers", "density", "every", "rounds", "pattern")}
            agree(self.exchange, model, options, weights={})
            numbers = [message.decode() for message in self.exchange.share(str(self.worker).encode())]
            if numbers != [str(worker) for worker in range(self.workers)]:
                raise ExchangeError(
                    f"worker= must be the ranks from 0 to {self.workers - 1}, in their order; got {numbers}"
                )
        messages = self.exchange.share(to_bytes(self.weight(name) for name in self._parts[self.worker]))
        arrived: dict[str, Tensor] = {}
        for worker, (part, message) in enumerate(zip(self._parts, messages, strict=True)):
            likes = [self._like(name, grown) for name in part]
            arrived |= dict(zip(part, from_bytes(message, likes, worker, ", ".join(part)), strict=True))
        weights = {id(self.weight(name)) for name in self.layers}
        others: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in weights
        }
        others |= {n: b for n, b in model.named_buffers() if b.is_floating_point()}
        means = self.exchange([x.detach() for x in others.values()], [*others]) if others else []
        for x, mean in zip(others.values(), means, strict=True):
            x.copy_(mean)
        for name, numbers in arrived.items():
            if grown and name not in self._parts[self.worker]:
                self.grow_(name)
            weight = self.weight(name)
            weight.copy_(numbers.view_as(weight))

    def _like(self, name: str, grown: bool) -> Tensor:
        """The shape and dtype of a weight where it is, or is not, grown."""
        layer, weight = self.layers[name], self.weight(name)
        places = layer.topology.places if grown and isinstance(layer, SparseLayer) else weight.numel()
        return torch.empty(places, dtype=weight.dtype, device="meta")
