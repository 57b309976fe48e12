"""Sup-tickets: several cheap sparse networks from the end of one training, superposed into one.

Yin, Menkovski, Fang, Huang, Pei, Pechenizkiy, Mocanu, Liu 2022 (UAI), "Superposing Many Tickets into One: A Performance Booster for
Sparse Neural Network Training", arXiv 2207.04606. Ordinary dynamic sparse training, then short cycles: at the start of each half of
the connections go at once and grow back by the dense gradient; at its end the network is a ticket. Differs from the authors'
code: theirs averages and cuts after every ticket, here all tickets are kept (they are sparse) and averaged and cut once.
As there the network before the first cycle is a ticket too, a place that a ticket does not hold counts as zero, and the cut
is global, which loses the layers' budget; each of the latter two can be had otherwise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from noctule.compress.prune.pattern import Candidates, Globally, Pattern
from noctule.core.keys import slots_of
from noctule.core.method import Method
from noctule.core.remap import Remap, merge
from noctule.core.schedule import cosine
from noctule.core.topology import Topology
from noctule.sparse.layers import SparseLayer
from noctule.sparse.rewire import Rewire, steepest


class SupTickets(Method):
    """Keeps the sparse network after ``start`` steps and after every ``cycle`` steps from then on.

    Attach it after the `Rewire` that explores, as `sup_tickets` returns the two: it then acts before connections move. When
    training is over, `superpose_` gives a model the average of the tickets.

    Args:
        start: steps before the first cycle.
        cycle: steps of a cycle.
        tickets: cycles.
    """

    def __init__(self, *, start: int, cycle: int, tickets: int = 3) -> None:
        if min(start, cycle, tickets) < 1:
            raise ValueError(f"start, cycle and tickets must be at least 1, got {start}, {cycle} and {tickets}")
        self.start, self.cycle, self.tickets = start, cycle, tickets
        self.steps = 0
        self.taken: list[dict[str, Any]] = []
        """Places, values and everything else of each ticket."""
        self._model: nn.Module | None = None

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        if not any(isinstance(m, SparseLayer) for m in model.modules()):
            raise ValueError(
                "tickets are sparse networks, and the model has no sparse layer: convert_ it with ToSparse first"
            )
        self._model = model

    @override
    def after_step(self) -> None:
        self.steps += 1
        since = self.steps - self.start
        if since >= 0 and since % self.cycle == 0 and since <= self.tickets * self.cycle:
            assert self._model is not None
            self.taken.append(_ticket(self._model))

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """Tickets have places of their own; only a width must not change.

        Raises:
            ValueError: it did, and there are tickets.
        """
        if self.taken and (remap.rows is not None or remap.columns is not None):
            raise ValueError("tickets of another width cannot be superposed: shrink the model before the first cycle")

    @override
    def end(self) -> None:
        self._model = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "taken": [dict(ticket) for ticket in self.taken]}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.taken = int(state["steps"]), [dict(ticket) for ticket in state["taken"]]

    @torch.no_grad()
    def superpose_(self, model: nn.Module, *, pattern: Pattern | None = None, presence: bool = False) -> None:
        """Give a model the average of the tickets, cut to as many weights as it had.

        Statistics of batch norms are to be computed anew afterwards, as by ``torch.optim.swa_utils.update_bn``.

        Args:
            model: the one that was trained, or a copy; in an open session methods and optimizers follow.
            pattern: which places of the average stay, by magnitude (None: `Globally`).
            presence: average each place over the tickets that hold it only.

        Raises:
            ValueError: there is no ticket, or they are of another model.
        """
        if not self.taken:
            raise ValueError(f"there is no ticket yet after {self.steps} steps: the first is taken after {self.start}")
        layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
        first = self.taken[0]
        rest = _dense_state(model)
        if {*first["layers"]} != {*layers} or {*first["rest"]} != {*rest}:
            raise ValueError(
                f"the tickets are of a model with the sparse layers {[*first['layers']]}, this one has {[*layers]}"
            )
        merged = {name: self._merged(name, presence=presence) for name in layers}
        candidates = [
            Candidates(tuple(layers[name].weight.shape), topology.keys(), values.abs())
            for name, (topology, values) in merged.items()
        ]
        places = sum(layer.topology.places for layer in layers.values())
        density = sum(layer.weights for layer in layers.values()) / max(places, 1)
        stays = (pattern or Globally())(candidates, density)
        for (name, (topology, values)), kept in zip(merged.items(), stays, strict=True):
            layer = layers[name]
            cut = Topology.from_keys(topology.shape, topology.keys()[kept])
            layer.remap_(cut, Remap.between(layer.topology, cut))
            layer.values.copy_(values[kept])
        for key, x in rest.items():
            x.copy_(torch.stack([ticket["rest"][key].double() for ticket in self.taken]).mean(0))

    def _merged(self, name: str, *, presence: bool) -> tuple[Topology, Tensor]:
        parts = [ticket["layers"][name] for ticket in self.taken]
        topologies = [Topology.from_keys(tuple(part["shape"]), part["keys"]) for part in parts]
        union, mean = merge(topologies, [part["values"] for part in parts])
        if not presence:
            holders = sum((slots_of(t.keys(), union.keys()) >= 0).to(mean.dtype) for t in topologies)
            mean = mean * holders / len(topologies)
        return union, mean


def sup_tickets(
    *, start: int, cycle: int, tickets: int = 3, every: int = 100, fraction: float = 0.5, seed: int = 0
) -> tuple[Rewire, SupTickets]:
    """The two methods of Sup-tickets, in the order in which to attach them.

    Connections move every ``every`` steps up to ``start``, ever fewer along a cosine; then ``fraction`` of them once at the start
    of each cycle. The paper's cycles are 8 of 250 epochs, three of them, with a learning rate that rises from a hundredth of the
    highest to a twentieth and falls back.

    Raises:
        ValueError: ``every`` does not divide ``start`` and ``cycle``.
    """
    if every < 1 or start % every or cycle % every:
        raise ValueError(
            f"every={every} must divide start={start} and cycle={cycle}: connections move at the start of a cycle"
        )
    falling = cosine(fraction, end=0.0, steps=start)

    def moved(step: int) -> float:
        return falling(step) if step < start else fraction if (step - start) % cycle == 0 else 0.0

    taken = SupTickets(start=start, cycle=cycle, tickets=tickets)
    return Rewire(grow=steepest, fraction=moved, every=every, until=start + tickets * cycle, seed=seed), taken


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """All floating-point parameters and buffers but the values of sparse layers, by name."""
    values = {id(m.values) for m in model.modules() if isinstance(m, SparseLayer)}
    both = [*model.named_parameters(), *model.named_buffers()]
    return {name: x for name, x in both if id(x) not in values and x.is_floating_point()}


def _ticket(model: nn.Module) -> dict[str, Any]:
    layers = {
        name: {"shape": list(m.topology.shape), "keys": m.topology.keys(), "values": m.values.detach().clone()}
        for name, m in model.named_modules()
        if isinstance(m, SparseLayer)
    }
    return {"layers": layers, "rest": {name: x.detach().clone() for name, x in _dense_state(model).items()}}
