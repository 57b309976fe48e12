"""The weights of a shard, the optimizer that moves them, and the connections that those of sparse layers belong to."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.core.errors import ExchangeError
from noctule.core.finite import all_finite
from noctule.core.optim import carry_state, check_carry
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.parallel.server.moves import Ledger, Move


class Weights:
    """Parameters by name.

    Args:
        optimizer: makes the optimizer of a list of parameters.
        first: their first numbers.
        places: of the values of sparse layers.
    """

    def __init__(
        self,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        first: Mapping[str, Tensor],
        places: Mapping[str, Topology],
    ) -> None:
        """Take copies."""
        self.parameters = {name: nn.Parameter(x.detach().clone()) for name, x in first.items()}
        self.optimizer = optimizer(list(self.parameters.values()))
        self.ledgers = {name: Ledger(topology) for name, topology in places.items()}
        self.outdated = 0
        """How many gradients were of connections so old that nothing is known of them, and were left out."""

    def laid(self, gradients: Mapping[str, Tensor], versions: Mapping[str, int]) -> dict[str, Tensor]:
        """The gradients, those of sparse layers on today's slots; by default they are of today's connections."""
        found = {}
        for name, gradient in gradients.items():
            ledger = self.ledgers.get(name)
            laid = gradient if ledger is None else ledger.laid(gradient, versions.get(name, ledger.version))
            if laid is None:
                self.outdated += 1
            else:
                found[name] = laid
        return found

    @torch.no_grad()
    def step(self, gradients: Iterable[Mapping[str, Tensor]]) -> None:
        """Go by the mean of several gradients, which the optimizer may change."""
        several = list(gradients)
        for name, p in self.parameters.items():
            given = [each[name] for each in several if name in each]
            if given:
                p.grad = given[0] if len(several) == 1 else sum(given[1:], given[0]) / len(several)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def move(self, moves: Mapping[str, tuple[Move, Tensor]]) -> dict[str, Remap]:
        """Move connections of some layers, given the first values of those that come; the optimizer's state follows.

        Raises:
            ExchangeError: that is no move of the connections there are; nothing is changed.
        """
        found = {name: move.of(self.ledgers[name].topology) for name, (move, _) in moves.items()}
        for name, (_, first) in moves.items():
            check_carry(self.optimizer, self.parameters[name])
            if not all_finite(first):
                raise ExchangeError(f"a new connection of {name!r} begins at a value that is NaN or infinite")
        for name, (topology, remap) in found.items():
            (move, first), p = moves[name], self.parameters[name]
            new = p.new_zeros(remap.new_size).masked_scatter_(remap.old_slot < 0, first)
            p.copy_(remap.apply(p.detach(), new=new))
            carry_state(self.optimizer, p, p, remap)
            self.ledgers[name].note(move, topology, remap)
        return {name: remap for name, (_, remap) in found.items()}

    def kept(self, key: str) -> dict[str, Tensor]:
        """What the optimizer keeps under a key for each parameter, such as ``momentum_buffer``; only what is as large as it."""
        found = {name: self.optimizer.state.get(p, {}).get(key) for name, p in self.parameters.items()}
        return {n: x for n, x in found.items() if isinstance(x, Tensor) and x.shape == self.parameters[n].shape}

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "ledgers": {name: ledger.state_dict() for name, ledger in self.ledgers.items()},
            "outdated": self.outdated,
        }

    @classmethod
    def from_state_dict(
        cls, optimizer: Callable[[list[nn.Parameter]], Optimizer], state: Mapping[str, Any]
    ) -> "Weights":
        """What `state_dict` gave."""
        made = cls(optimizer, state["weights"], {})
        made.optimizer.load_state_dict(state["optimizer"])
        made.ledgers = {name: Ledger.from_state_dict(each) for name, each in state["ledgers"].items()}
        made.outdated = state["outdated"]
        return made
