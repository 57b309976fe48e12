"""Removing units of groups that were found in a model's graph: everywhere at once, rehearsed on a copy first.

What a removed unit gives without its incoming weights is the same for every sample: its bias, through norms and activations. A
copy without those weights runs on the example, and what the readers of the unit see there goes into their biases, or into the
running mean of a batch norm right behind.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.compress.shrink.groups import Score, columns_of, groups_of, least
from noctule.compress.shrink.record import apply, prepared, step_of
from noctule.compress.shrink.trace import arguments_of, traced
from noctule.compress.shrink.widths import groups_of as groups_in
from noctule.sparse.layers import SparseLayer

_COUNTS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_key_value_heads", "nhead"),
    *("split_size", "all_head_size", "inner_dim"),
)
"""Numbers that modules keep of their heads, or of the features of all heads."""
_TINY = 1e-7


@dataclass
class Removal:
    """What is to go, and what has to be known of it."""

    step: dict[str, Any]
    """See `noctule.compress.shrink.record`."""
    lost: dict[str, int]
    """Name of a layer -> how many features it loses."""
    whole: dict[str, str] = field(default_factory=dict)
    """Groups that stay as they are, by name -> why."""
    inexact: dict[str, str] = field(default_factory=dict)
    """Groups without whose units others change -> what changes."""


class Following:
    """A traced model, whose groups can lose units.

    Args:
        model: any that `torch.export` can follow.
        example: its arguments, see `noctule.compress.shrink.trace`.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        self.trace = traced(model, example)
        self.groups, self.left = groups_of(self.trace)

    def sizes(self) -> dict[str, int]:
        """How many features each layer makes, by its name."""
        return {
            tensor.rpartition(".")[0]: self.trace.size_of(tensor, dimension)
            for tensor, dimension in self.trace.producers
        }

    def chosen(self, keep: float, score: Score, round_to: int, skip: Sequence[str], least_kept: int = 1) -> Removal:
        """Units with the least scores of every group, so that this share of each is kept, and at least so many units."""
        layers = {layer: group for group in self.groups for layer in group.layers}
        if unknown := set(skip) - {*layers, *self.left}:
            raise ValueError(f"skip names no layer of a group: {sorted(unknown)}; there are {sorted(layers)}")
        gone: dict[int, Tensor] = {}
        whole: dict[str, str] = {}
        for number, group in enumerate(self.groups):
            if any(layer in skip for layer in group.layers):
                whole[group.name] = "skip= leaves it as it is"
                continue
            width = group.members[group.producers[0]].shape[1]
            kept = min(group.units, max(least_kept, round(group.units * keep)))
            while kept < group.units and (kept * width) % round_to:
                kept += 1
            if kept == group.units:
                whole[group.name] = (
                    f"{round_to=} leaves none of {kept * width} features to remove" if keep < 1 else "all are kept"
                )
                continue
            gone[number] = least(score(self.model, group), kept)
        return self.removal(gone, whole)

    def named(self, masks: Mapping[str, Tensor]) -> Removal:
        """The features of layers that are named (masks (O,) of what goes), and all that goes with them.

        Raises:
            ValueError: they cannot go, or not without others of the same unit.
        """
        gone: dict[int, Tensor] = {}
        asked: dict[int, str] = {}
        for layer, mask in masks.items():
            left = mask.clone()
            for number, group in enumerate(self.groups):
                for member in (m for m in group.producers if m[0].rpartition(".")[0] == layer):
                    lines = group.members[member]
                    going = mask[lines]
                    if (going.any(1) != going.all(1)).any():
                        raise ValueError(
                            f"{layer}: {lines.shape[1]} features go together or not at all, such as those of a head, here "
                            f"{lines[(going.any(1) != going.all(1))][0].tolist()!r:.100}"
                        )
                    left[lines.flatten()] = False
                    if number in gone and (gone[number] != going.all(1)).any():
                        raise ValueError(
                            f"{layer} and {asked[number]} lose their features together: name one of them, or the same features"
                        )
                    gone[number], asked[number] = going.all(1), layer
            if left.any():
                why = self.left.get(layer, "no layer of that name makes features that can go")
                raise ValueError(
                    f"{layer or 'the model'} cannot lose features {left.nonzero()[:, 0].tolist()!r:.100}: {why}"
                )
        for number, mask in gone.items():
            if mask.all():
                raise ValueError(f"{asked[number]}: at least one feature must stay")
        return self.removal({number: mask for number, mask in gone.items() if mask.any()}, {})

    def removal(self, gone: Mapping[int, Tensor], whole: dict[str, str]) -> Removal:
        """What goes where these units (masks (U,)) of these groups go."""
        removed: dict[str, dict[int, Tensor]] = {}
        numbers: dict[str, Any] = {}
        lost: dict[str, int] = {}
        for number, mask in gone.items():
            group = self.groups[number]
            for (tensor, dimension), lines in group.members.items():
                sizes = removed.setdefault(tensor, {})
                if dimension not in sizes:
                    sizes[dimension] = torch.zeros(self.trace.size_of(tensor, dimension), dtype=torch.bool)
                sizes[dimension][lines[mask].flatten()] = True
                if (tensor, dimension) in group.producers:
                    name = tensor.rpartition(".")[0]
                    lost[name] = lost.get(name, 0) + int(mask.sum()) * lines.shape[1]
                    if lines.shape[1] > 1:
                        numbers |= self._counts(name, group.units, int((~mask).sum()))
        for module, labels in self.trace.norms:
            norm = self.model.get_submodule(module)
            if getattr(norm, "weight", None) is None and hasattr(norm, "normalized_shape"):
                stay = labels.numel() - self._gone_of(labels, gone)
                numbers[f"{module}.normalized_shape"] = [stay]
        step = step_of(self.model, removed, numbers)
        inexact = {self.groups[n].name: text for n in gone if (text := self.groups[n].inexact) is not None}
        return Removal(step, lost, whole, inexact)

    def make_(self, removal: Removal, optimizers: Sequence[Optimizer]) -> None:
        """Remove; everything that can be refused is refused before anything changed."""
        self.check(removal, optimizers)
        constants = self._constants(copy.deepcopy(self.model).eval(), removal)
        self._fold(constants, removal)
        apply(self.model, removal.step, optimizers=optimizers)

    def check(self, removal: Removal, optimizers: Sequence[Optimizer]) -> None:
        """Find out whether all that is kept for the weights can follow, and whether a copy of the model runs without these.

        Raises:
            ValueError: not so.
        """
        prepared(self.model, removal.step, optimizers=optimizers)
        twin = copy.deepcopy(self.model).eval()
        try:
            apply(twin, removal.step)
            with torch.no_grad():
                arguments, named = arguments_of(self.example)
                twin(*arguments, **named)
        except Exception as error:  # of any kind: what the model's forward does is not ours
            text = " ".join(str(error).split())
            raise ValueError(
                f"the model does not run without these: {type(error).__name__}: {text:.300}. Some code of it has widths of its "
                "own; leave its layers out with skip=, or name others"
            ) from error

    def _counts(self, layer: str, units: int, kept: int) -> dict[str, int]:
        """The numbers of heads that the module round a layer keeps, after this."""
        parent = layer.rpartition(".")[0]
        module = self.model.get_submodule(parent)
        found = {name: getattr(module, name, None) for name in _COUNTS}
        return {
            f"{parent}.{name}" if parent else name: number // units * kept
            for name, number in found.items()
            if isinstance(number, int) and not isinstance(number, bool) and number % units == 0
        }

    def _gone_of(self, labels: Tensor, gone: Mapping[int, Tensor]) -> int:
        sets = self.trace.lines.sets(labels)
        going: list[int] = []
        for number, mask in gone.items():
            tensor, dimension = self.groups[number].producers[0]
            lines = self.groups[number].members[tensor, dimension][mask].flatten()
            size = self.trace.size_of(tensor, dimension)
            going += self.trace.lines.sets(self.trace.lines.of(tensor, dimension, size)[lines]).unique().tolist()
        return int(torch.isin(sets, torch.tensor(going, dtype=torch.int64)).sum())

    # The constants of removed units.

    @torch.no_grad()
    def _constants(self, twin: nn.Module, removal: Removal) -> dict[str, list[Tensor]]:
        """What each reader sees at each use of the removed features (I,), zero elsewhere, where their incoming weights are zero.

        Weights that lead from one removed feature to another stay: what the one gives belongs to the other's constant.
        """
        cut = removal.step["cut"]
        producers = {member for group in self.groups for member in group.producers}
        for tensor, dimensions in cut.items():
            for dimension, entry in dimensions.items():
                if (tensor, int(dimension)) in producers:
                    reading = str(self.trace.reading.get(tensor))
                    read = dimensions.get(reading) if reading != dimension else None
                    _silence(twin, tensor, int(dimension), _gone(entry), None if read is None else _gone(read))
        seen: dict[str, list[Tensor]] = {}
        hooks = []
        for tensor, dimensions in cut.items():
            module, own = self.trace.reader_of(tensor)
            reading = self.trace.reading.get(tensor)
            if reading is None or str(reading) not in dimensions or not own:
                continue
            reader = twin.get_submodule(module)
            gone = _gone(dimensions[str(reading)]).repeat(groups_in(reader))
            hooks.append(reader.register_forward_pre_hook(_watch(seen, tensor, gone)))
        arguments, named = arguments_of(self.example)
        twin(*arguments, **named)
        for hook in hooks:
            hook.remove()
        return seen

    @torch.no_grad()
    def _fold(self, constants: Mapping[str, list[Tensor]], removal: Removal) -> None:
        for tensor, (seen, *others) in constants.items():
            module, own = self.trace.reader_of(tensor)
            layer: Any = self.model.get_submodule(module)
            reading = self.trace.reading[tensor]
            weighted = _weighted(layer, layer._parameters[own], seen, reading)
            if float(weighted.abs().max()) <= _TINY:
                continue
            norm: Any = self.trace.norm_behind(tensor)
            bias = layer._parameters.get("bias")
            if not all(torch.allclose(seen, other) for other in others):
                removal.inexact[module] = (
                    "it is used several times, and sees something else of the removed features each time"
                )
            elif bias is not None:
                bias.copy_(bias.double() + weighted)
            elif norm is not None and not (isinstance(layer, SparseLayer) and layer.epilogue.slope != 1.0):
                mean = norm.running_mean
                mean.copy_(mean.double() - weighted)
            else:
                removal.inexact[module] = (
                    "it has no bias, nor a batch norm right behind it, to take what the removed features give without their weights"
                )


def _gone(entry: Mapping[str, Any]) -> Tensor:
    gone = torch.ones(entry["of"], dtype=torch.bool)
    gone[entry["kept"]] = False
    return gone


def _silence(model: nn.Module, tensor: str, dimension: int, gone: Tensor, spared: Tensor | None = None) -> None:
    """Set the weights that lead into these features to zero but for those from the spared ones; biases stay."""
    module, _, own = tensor.rpartition(".")
    owner = model.get_submodule(module)
    parameter = owner._parameters[own]
    assert parameter is not None
    if isinstance(owner, SparseLayer):
        silent = gone.to(parameter.device)[owner.topology.rows()]
        if spared is not None:
            columns = torch.div(owner.topology.columns.to(torch.int64), columns_of(owner), rounding_mode="floor")
            silent &= ~spared.to(parameter.device)[columns]
        parameter.data[silent] = 0.0
    elif parameter.dim() > 1:
        silent = gone.view([-1 if d == dimension else 1 for d in range(parameter.dim())])
        if spared is not None:
            silent = silent & ~spared.view([-1 if d == 1 - dimension else 1 for d in range(parameter.dim())])
        parameter.data.masked_fill_(silent.to(parameter.device), 0.0)


def _watch(seen: dict[str, list[Tensor]], tensor: str, gone: Tensor) -> Any:
    """A hook that notes the usual value of each removed feature of a module's input, its last dimension, or 1 of images."""

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0].detach()
        features = x.dim() - 1 if x.shape[-1] == gone.numel() and columns_of(module) == 1 and x.dim() != 4 else 1
        each = x.transpose(0, features).flatten(1)
        constant = torch.where(gone.to(x.device), each.double().median(1).values, 0.0)
        seen.setdefault(tensor, []).append(constant)

    return note


def _weighted(layer: nn.Module, weight: Tensor, seen: Tensor, reading: int) -> Tensor:
    """W x (O,) of what a layer reads (I,), a convolution's with its padding taken for more of the same."""
    if isinstance(layer, SparseLayer):
        each = columns_of(layer)
        columns = torch.div(layer.topology.columns.to(torch.int64), each, rounding_mode="floor")
        terms = weight.double() * seen[columns]
        return seen.new_zeros(layer.topology.shape[0]).index_add_(0, layer.topology.rows(), terms)
    matrix = weight.double() if reading else weight.double().transpose(0, 1)
    if matrix.dim() > 2:
        matrix = matrix.flatten(2).sum(2)
    groups = groups_in(layer)
    return (matrix.view(groups, -1, matrix.shape[1]) @ seen.view(groups, -1, 1)).flatten()
