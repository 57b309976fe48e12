"""The weights of a shard, the optimizer that updates them, and the topologies of those that are sparse."""

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
from noctule.parallel.server.moves import Move, TopologyLog


class Weights:
    """Parameters by name, with their optimizer.

    Args:
        optimizer: makes the optimizer of a list of parameters.
        first: the initial values, which are copied.
        places: the topologies of parameters that are a sparse layer's values.
    """

    def __init__(
        self,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        first: Mapping[str, Tensor],
        places: Mapping[str, Topology],
    ) -> None:
        self.parameters = {name: nn.Parameter(x.detach().clone()) for name, x in first.items()}
        self.optimizer = optimizer(list(self.parameters.values()))
        self.logs = {name: TopologyLog(topology) for name, topology in places.items()}
        self.outdated = 0
        """How many gradients were left out because the log does not go back to their topology."""

    def remapped(self, gradients: Mapping[str, Tensor], versions: Mapping[str, int]) -> dict[str, Tensor]:
        """The gradients, moved from the topologies of these versions to the present ones (default: they belong to those)."""
        found = {}
        for name, gradient in gradients.items():
            log = self.logs.get(name)
            moved = gradient if log is None else log.remapped(gradient, versions.get(name, log.version))
            if moved is None:
                self.outdated += 1
            else:
                found[name] = moved
        return found

    @torch.no_grad()
    def step(self, gradients: Iterable[Mapping[str, Tensor]]) -> None:
        """Make a step with the mean of several gradients, which the optimizer may change."""
        several = list(gradients)
        for name, p in self.parameters.items():
            given = [each[name] for each in several if name in each]
            if given:
                p.grad = given[0] if len(several) == 1 else sum(given[1:], given[0]) / len(several)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def move(self, moves: Mapping[str, tuple[Move, Tensor]]) -> dict[str, Remap]:
        """Move connections of some layers; the optimizer's state follows.

        Args:
            moves: for each layer the move and the initial values of its new connections.

        Raises:
            ExchangeError: a move does not fit the present connections; nothing is changed.
        """
        found = {name: move.of(self.logs[name].topology) for name, (move, _) in moves.items()}
        for name, (_, first) in moves.items():
            check_carry(self.optimizer, self.parameters[name])
            if not all_finite(first):
                raise ExchangeError(f"a new connection of {name!r} begins at a value that is NaN or infinite")
        for name, (topology, remap) in found.items():
            (move, first), p = moves[name], self.parameters[name]
            new = p.new_zeros(remap.new_size).masked_scatter_(remap.old_slot < 0, first)
            p.copy_(remap.apply(p.detach(), new=new))
            carry_state(self.optimizer, p, p, remap)
            self.logs[name].note(move, topology, remap)
        return {name: remap for name, (_, remap) in found.items()}

    def kept(self, key: str) -> dict[str, Tensor]:
        """The optimizer's state under a key such as ``momentum_buffer``, for each parameter whose shape it has."""
        found = {name: self.optimizer.state.get(p, {}).get(key) for name, p in self.parameters.items()}
        return {n: x for n, x in found.items() if isinstance(x, Tensor) and x.shape == self.parameters[n].shape}

    def state_dict(self) -> dict[str, Any]:
        """All of the state, as plain data."""
        return {
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "logs": {name: log.state_dict() for name, log in self.logs.items()},
            "outdated": self.outdated,
        }

    @classmethod
    def from_state_dict(
        cls, optimizer: Callable[[list[nn.Parameter]], Optimizer], state: Mapping[str, Any]
    ) -> "Weights":
        """Make them from a state."""
        made = cls(optimizer, state["weights"], {})
        made.optimizer.load_state_dict(state["optimizer"])
        made.logs = {name: TopologyLog.from_state_dict(each) for name, each in state["logs"].items()}
        made.outdated = state["outdated"]
        return made
