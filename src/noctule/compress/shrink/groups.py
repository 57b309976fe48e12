"""Groups of lines that can go: what is removed together, found from a trace; and scores that say which matter least.

A group has units; a unit is all that goes together: a channel with the rows, norms and columns of it everywhere, or a head.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noctule.compress.shrink.labels import Trace
from noctule.sparse.layers import SparseConv2d, SparseLayer

Member = tuple[str, int]
"""Name of a tensor, and one of its dimensions; of a sparse layer's values 0 are the rows, 1 the features that columns belong to."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units of which any may go."""

    name: str
    """The first layer that makes them."""
    members: dict[Member, Tensor]
    """The lines (U, L) of each of U units in each dimension that is theirs."""
    producers: tuple[Member, ...]
    """The dimensions whose lines make the features."""
    inexact: str | None
    """What changes for the units that stay, such as the statistics of a norm; None: nothing."""

    @property
    def units(self) -> int:
        """How many there are."""
        return next(iter(self.members.values())).shape[0]

    @property
    def layers(self) -> list[str]:
        """The modules that make the features."""
        return [tensor.rpartition(".")[0] for tensor, _ in self.producers]


Score = Callable[[nn.Module, Group], Tensor]
"""A model and a group -> a number for each unit (U,); those with the least go first."""


def groups_of(trace: Trace) -> tuple[list[Group], dict[str, str]]:
    """The groups of a traced model in the order of its graph, and why other layers keep their widths, by name."""
    owned: dict[int, dict[Member, list[int]]] = defaultdict(lambda: defaultdict(list))
    for tensor, dimension, sets in trace.lines.dimensions():
        for line, number in enumerate(sets.tolist()):
            owned[number][tensor, dimension].append(line)
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    left: dict[str, str] = {}
    for number, members in owned.items():
        made = [member for member in members if member in trace.producers]
        if (reason := trace.lines.reasons.get(number)) is not None:
            left |= {tensor.rpartition(".")[0]: reason for tensor, _ in made}
        elif made:
            alike[tuple(sorted((*member, len(lines)) for member, lines in members.items()))].append(number)
    groups = []
    for numbers in alike.values():
        members = {member: torch.tensor([owned[number][member] for number in numbers]) for member in owned[numbers[0]]}
        producers = tuple(member for member in members if member in trace.producers)
        inexact = next((trace.lines.inexact[number] for number in numbers if number in trace.lines.inexact), None)
        groups.append(Group(producers[0][0].rpartition(".")[0], members, producers, inexact))
    for group in groups:
        for layer in group.layers:
            left.pop(layer, None)
    return groups, left


def least(scores: Tensor, kept: int) -> Tensor:
    """Which units (U,) go so that so many with the largest scores are kept; of equals the first go."""
    gone = torch.zeros(scores.numel(), dtype=torch.bool)
    gone[scores.argsort(stable=True)[: scores.numel() - kept]] = True
    return gone


# Scores.


def magnitude(model: nn.Module, group: Group) -> Tensor:
    """The root of the sum of squares of all weights of each unit, biases and norms apart.

    Li et al. 2017, arXiv 1608.08710, where it is the sum of absolute weights of one layer's filter.
    """
    return over_weights(model, group, group.members, lambda p: p.detach().double().square()).sqrt()


def taylor(model: nn.Module, group: Group) -> Tensor:
    """How much the loss would change without each unit, to first order: |sum of w g| (Molchanov et al. 2019, arXiv 1906.10771).

    Raises:
        ValueError: there are no gradients: call ``backward()`` on a loss before.
    """

    def product(p: Tensor) -> Tensor:
        if p.grad is None:
            raise ValueError("the Taylor score needs gradients: call backward() on a loss of some batches before")
        return (p.detach() * p.grad).double()

    return over_weights(model, group, group.members, product).abs()


def incoming(model: nn.Module, group: Group) -> Tensor:
    """The sum of the absolute weights that lead into each unit (Curci et al. 2021, arXiv 2102.01732)."""
    return over_weights(model, group, group.producers, lambda p: p.detach().double().abs())


def over_weights(model: nn.Module, group: Group, members: Iterable[Member], each: Callable[[Tensor], Tensor]) -> Tensor:
    """The sums (U,) over all numbers of these members, of weights with two dimensions or more."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for tensor, dimension in members:
        module, _, last = tensor.rpartition(".")
        owner = model.get_submodule(module)
        parameter = owner._parameters.get(last)
        if parameter is None or (last != "values" if isinstance(owner, SparseLayer) else parameter.dim() < 2):
            continue
        lines = line_sums(owner, each(parameter), dimension).cpu()
        total += lines[group.members[tensor, dimension]].sum(1)
    return total


def line_sums(owner: nn.Module, numbers: Tensor, dimension: int) -> Tensor:
    """What the numbers of a weight add up to, for each of its lines in a dimension."""
    if not isinstance(owner, SparseLayer):
        return numbers.transpose(0, dimension).flatten(1).sum(1)
    topology = owner.topology
    at = topology.columns.to(torch.int64) if dimension else topology.rows()
    each = columns_of(owner) if dimension else 1
    size = topology.shape[dimension] // each
    return numbers.new_zeros(size).index_add_(0, torch.div(at, each, rounding_mode="floor"), numbers)


def columns_of(layer: nn.Module) -> int:
    """How many columns of a layer's weight as a matrix belong to a feature: the places of the kernel."""
    if isinstance(layer, SparseConv2d):
        return layer.geometry.kernel_size[0] * layer.geometry.kernel_size[1]
    weight = getattr(layer, "weight", None)
    return int(weight[0, 0].numel()) if isinstance(weight, Tensor) and weight.dim() > 2 else 1
