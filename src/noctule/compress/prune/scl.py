"""SCL: sparse connectivity learning, a gate on each connection and a penalty on how many are open.

Tang, Luo, Xie and others 2022 (IEEE TNNLS), "Automatic Sparse Connectivity Learning for Neural Networks", arXiv 2201.05020. A
weight is v step(m); the gradient passes the step as through the identity and is normalised per feature; the number of connections
is added to the loss. How sparse the network becomes is found, not set. Differs from the paper, of which no code is public: gates
begin after ``start`` steps at the sizes of the values, over the root mean square of their row, so small ones are asked first;
they take plain steps at a rate of their own and lie in [-1, 3]; normalised is by the root mean square of a row's gate gradients, so
that the penalty means the same in every layer; a layer keeps its last gate open; after ``until`` steps gates are frozen, and closed
connections are masked.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.prune.pruning import Pruning

LEAST, HIGHEST = 0.01, 3.0
"""Where gates begin at least: a value of zero is open too, else no gradient would ever reach it; and at most, then and later."""


class SCL(Pruning):
    """Learns which connections of dense layers are open, and freezes them after ``until`` steps.

    Between the steps a closed weight is zero, so forward and evaluation see the sparse network; the optimizer trains the value
    behind the gate. Training is dense, with about three times the parameters in memory; its text says so, and how many it kept.
    Sparse layers are left as they are.

    Args:
        penalty: what an open connection costs, as a share of the root mean square of its feature's gate gradients; more is sparser.
        until: the number of steps after which the gates are frozen.
        start: steps before the gates begin; a tenth of the training gives the values time to differ.
        rate: of the gates, which begin at 1 in the mean square and close below 0.
        skip: names of layers that are left alone.
    """

    shaped = MappingProxyType({"gates": 1.0, "_values": 0.0})

    def __init__(
        self, *, penalty: float, until: int, start: int = 0, rate: float = 0.01, skip: Sequence[str] = ()
    ) -> None:
        if penalty < 0.0 or rate <= 0.0 or not 0 <= start < until:
            raise ValueError(
                f"SCL needs penalty >= 0, rate > 0 and 0 <= start < until, got {penalty}, {rate}, {start} and {until}"
            )
        super().__init__(skip)
        self.penalty, self.until, self.start, self.rate = penalty, until, start, rate
        self.gates: dict[str, Tensor] = {}
        """Of each dense layer, in the shape of its weight, from ``start`` until they are frozen."""
        self._values: dict[str, Tensor] = {}

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        super().begin(model, optimizers)
        if not self._gone:
            raise ValueError("SCL learns which connections of dense layers stay, and the model has only sparse ones")

    @torch.no_grad()
    @override
    def before_step(self) -> None:
        super().before_step()
        if self.steps == self.start:
            self._values = {name: self.weight(name).detach().clone() for name in self._gone}
            self.gates = {name: _normalised(value.abs()).clamp(LEAST, HIGHEST) for name, value in self._values.items()}
        for name, gate in self.gates.items():
            weight = self.weight(name)
            weight.copy_(torch.where(gate > 0.0, weight, self._values[name]))
            if weight.grad is not None:
                through = _normalised(weight.grad * weight)
                weight.grad.masked_fill_(gate <= 0.0, 0.0)
                best = gate.flatten().argmax()
                gate.sub_(self.rate * (through + self.penalty)).clamp_(-1.0, HIGHEST)
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


def _normalised(x: Tensor) -> Tensor:
    """Each row over its root mean square."""
    rows = x.flatten(1)
    return (rows / rows.pow(2).mean(1, keepdim=True).sqrt().clamp_(min=1e-30)).view_as(x)
