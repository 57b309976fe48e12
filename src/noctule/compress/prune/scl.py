"""SCL: sparse connectivity learning, a gate on each connection and a penalty on how many are open.

Tang, Luo, Xie and others 2022 (IEEE TNNLS), "Automatic Sparse Connectivity Learning for Neural Networks", arXiv 2201.05020. A
weight is v step(m); the gradient passes the step as through the identity and is normalised per feature; the number of connections
is added to the loss. How sparse the network becomes is found, not set. Differs from the paper, of which no code is public: gates
take plain steps at a rate of their own and lie in [-1, 1]; normalised is by the root mean square of a row's gate gradients, so that
the penalty means the same in every layer; a layer keeps its last gate open; after ``until`` steps gates are frozen, and closed
connections are masked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.prune.pruning import Pruning
from noctule.core.remap import Remap


class SCL(Pruning):
    """Learns which connections of dense layers are open, and freezes them after ``until`` steps.

    Between the steps a closed weight is zero, so forward and evaluation see the sparse network; the optimizer trains the value
    behind the gate. Training is dense, with about three times the parameters in memory; its text says so, and how many it kept.
    Sparse layers are left as they are.

    Args:
        penalty: what an open connection costs, as a share of the root mean square of its feature's gate gradients; more is sparser.
        until: the number of steps after which the gates are frozen.
        rate: of the gates, which begin at 1 and close below 0.
        skip: names of layers that are left alone.
    """

    def __init__(self, *, penalty: float, until: int, rate: float = 0.01, skip: Sequence[str] = ()) -> None:
        if penalty < 0.0 or rate <= 0.0 or until < 1:
            raise ValueError(f"SCL needs penalty >= 0, rate > 0 and until >= 1, got {penalty}, {rate} and {until}")
        super().__init__(skip)
        self.penalty, self.until, self.rate = penalty, until, rate
        self.gates: dict[str, Tensor] = {}
        """Of each dense layer, in the shape of its weight, until they are frozen."""
        self._values: dict[str, Tensor] = {}

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        super().begin(model, optimizers)
        dense = {name: self.weight(name) for name in self._gone}
        if not dense:
            raise ValueError("SCL learns which connections of dense layers stay, and the model has only sparse ones")
        if self.steps < self.until:
            self.gates = {name: self.gates.get(name, torch.ones_like(w.detach())) for name, w in dense.items()}
            self._values = {name: self._values.get(name, torch.zeros_like(w.detach())) for name, w in dense.items()}

    @torch.no_grad()
    @override
    def before_step(self) -> None:
        super().before_step()
        for name, gate in self.gates.items():
            weight = self.weight(name)
            weight.copy_(torch.where(gate > 0.0, weight, self._values[name]))
            if weight.grad is not None:
                through = (weight.grad * weight).flatten(1)
                through /= through.pow(2).mean(1, keepdim=True).sqrt().clamp_(min=1e-30)
                weight.grad.masked_fill_(gate <= 0.0, 0.0)
                best = gate.flatten().argmax()
                gate.sub_(self.rate * (through.view_as(gate) + self.penalty)).clamp_(-1.0, 1.0)
                if not (gate > 0.0).any():
                    gate.view(-1)[best] = self.rate

    @torch.no_grad()
    @override
    def act(self) -> None:
        for name, gate in self.gates.items():
            weight = self.weight(name)
            self._values[name].copy_(weight)
            weight.masked_fill_(gate <= 0.0, 0.0)
        if self.gates and self.steps >= self.until:
            self.keep_({name: self.stored(name, gate > 0.0) for name, gate in self.gates.items()})
            self.gates, self._values = {}, {}

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        super().remapped(layer, remap)
        self.follow(self.gates, layer, remap, new=1.0)
        self.follow(self._values, layer, remap, new=0.0)

    @override
    def weights(self, name: str) -> int:
        """How many connections of a layer are open."""
        return int((self.gates[name] > 0.0).sum()) if name in self.gates else super().weights(name)

    def __str__(self) -> str:
        """How many connections were found to be enough, and what finding them takes."""
        kept = self.report().values()
        weights, places = sum(k.weights for k in kept), sum(k.places for k in kept)
        return (
            f"SCL keeps {weights:,} of {places:,} connections ({weights / max(places, 1):.2%}); it trains densely, with 3 numbers "
            "a connection (weight, value behind the gate, gate) beside the optimizer's state until the gates are frozen"
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        gates, values = ({name: x.clone() for name, x in kept.items()} for kept in (self.gates, self._values))
        return super().state_dict() | {"gates": gates, "values": values}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.gates, self._values = ({n: x.clone() for n, x in state[k].items()} for k in ("gates", "values"))
