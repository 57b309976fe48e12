"""Other widths for the modules of a model; what is kept for their weights is checked before and follows after.

Shapes: O rows and I columns of a weight as a matrix; a convolution's columns are its input channels x kernel height x width.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from noctule.core.listeners import Listener, listeners_of
from noctule.core.optim import carry_state, check_carry
from noctule.core.remap import Remap, carried, cut, resize, resize_full
from noctule.core.topology import Topology
from noctule.sparse.layers import SparseConv2d, SparseLayer
from noctule.sparse.layers.foreign import note_for_hugging_face
from noctule.sparse.layers.places import fields_of

MATRICES = (SparseLayer, nn.Linear, nn.Conv2d)
"""Kinds with rows and columns."""
VECTORS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)
"""Kinds with one number of each sort for a feature."""

_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.BatchNorm1d: ("num_features",),
    nn.BatchNorm2d: ("num_features",),
    nn.PReLU: ("num_parameters",),
}


class Lines(NamedTuple):
    """For each new row and column the old one that it continues, -1 for a new one; None where they stay."""

    rows: Tensor | None = None
    columns: Tensor | None = None


Cuts = Mapping[str, Mapping[int, Tensor]]
"""The lines that stay in some dimensions of a module's own tensors, by their names; of a sparse layer's values dimension 0 are the
rows, and 1 the features that the columns belong to."""


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is of a kind with rows and columns, and its weight its own: a subclass may do anything with them."""
    return isinstance(module, SparseLayer) or (type(module) in MATRICES and "weight" in module._parameters)


def shape_of(module: Any) -> tuple[int, ...]:
    """(O, I) of a kind with rows and columns, (O,) of one with a number for each feature."""
    if isinstance(module, SparseLayer):
        return module.topology.shape
    if is_matrix(module):
        return tuple(module.weight.flatten(1).shape)
    return (getattr(module, _NAMES[type(module)][0]),)


def groups_of(module: nn.Module) -> int:
    """Into how many groups a convolution cuts its channels; 1 for what is none."""
    return int(getattr(module.geometry if isinstance(module, SparseConv2d) else module, "groups", 1))


def planned(
    model: nn.Module,
    lines: Mapping[str, Lines | Cuts],
    *,
    optimizers: Iterable[Optimizer] = (),
    tied: Mapping[str, list[str]] | None = None,
) -> "list[Change]":
    """Changes after which the named modules have these rows and columns; all refusals come here, before anything moved.

    Optimizers and methods of an open session on the model follow; ``optimizers`` are those that follow without one.

    Args:
        model: its modules are changed.
        lines: what stays of each module, by its name.
        optimizers: see above.
        tied: other names of a parameter that is cut, for all of which the cut is right; without it tied weights are refused.

    Raises:
        ValueError: a weight is tied, or something that is kept for it cannot follow.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel keeps buckets of the weights as they were: change the plain model, then wrap it again"
        )
    held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    changes = []
    for name, new in lines.items():
        module = model.get_submodule(name)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if held[id(parameter)] > 1 and tied is None:
                raise ValueError(
                    f"{parameter_name} of {name} is used in several places, not all of which would get other widths: "
                    "leave that layer as it is"
                )
            if type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"{parameter_name} of {name} is a {type(parameter).__name__}, not a plain parameter, and may be cut or "
                    "coded in a way of its own: change the plain model first"
                )
        also = {own: tied.get(f"{name}.{own}" if name else own, []) for own in module._parameters} if tied else {}
        places = {own: [_owner(model, other) for other in others] for own, others in also.items() if others}
        changes.append(_change(name, module, new, tuple(optimizers), places))
    for change in changes:
        change.check()
    return changes


def resize_to(model: nn.Module, state: Mapping[str, Any], *, optimizers: Iterable[Optimizer] = ()) -> None:
    """Give a model the widths of a state dict that is about to be loaded, so that it fits.

    A model that lost neurons in training is built anew at its full width, brought to the widths of the state, then loaded;
    after that the optimizer and the session. `fit` does so when it resumes. What the weights are meanwhile means nothing.

    Args:
        model: of the same layers, of any widths.
        state: what ``model.state_dict()`` gave.
        optimizers: the ones that train the model, where no open session does.

    >>> model, smaller = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> resize_to(model, smaller.state_dict())
    >>> model.load_state_dict(smaller.state_dict())
    <All keys matched successfully>
    """
    lines: dict[str, Lines | Cuts] = {}
    for name, module in model.named_modules():
        if not is_matrix(module) and type(module) not in VECTORS:
            if cuts := _first_of(state, f"{name}." if name else "", module):
                lines[name] = cuts
            continue
        wanted = _shape_in(state, f"{name}." if name else "", module)
        have = shape_of(module)
        if wanted is not None and wanted != have:
            lines[name] = Lines(*(None if w == h else _first(w, h) for w, h in zip(wanted, have, strict=True)))
    for change in planned(model, lines, optimizers=optimizers):
        change.make_()
    note_for_hugging_face(model)


def _first_of(state: Mapping[str, Any], prefix: str, module: nn.Module) -> dict[str, dict[int, Tensor]]:
    """The first lines of own parameters that are larger than in a state."""
    found: dict[str, dict[int, Tensor]] = {}
    for own, parameter in module.named_parameters(recurse=False):
        wanted = state.get(prefix + own)
        if isinstance(wanted, Tensor) and wanted.dim() == parameter.dim():
            smaller = {d: torch.arange(w) for d, (w, h) in enumerate(zip(wanted.shape, parameter.shape)) if 0 < w < h}
            if smaller and all(w <= h for w, h in zip(wanted.shape, parameter.shape)):
                found[own] = smaller
    return found


def _first(wanted: int, have: int) -> Tensor:
    """The first lines, and new ones where more are wanted than there are."""
    lines = torch.arange(wanted, device="cpu")
    return torch.where(lines < have, lines, -1)


def _shape_in(state: Mapping[str, Any], prefix: str, module: Any) -> tuple[int, ...] | None:
    """The shape a module has in a state, or None where that is not of its kind: loading says what is wrong."""
    if isinstance(module, SparseLayer):
        try:
            places = state[f"{prefix}_extra_state"]
            if isinstance(places, Tensor):
                fields = fields_of(places)
                return fields["rows"], fields["columns"]
            return int(places["shape"][0]), int(places["shape"][1])
        except (KeyError, TypeError, ValueError, IndexError):
            return None
    weight = state.get(f"{prefix}weight", state.get(f"{prefix}running_mean"))
    if not isinstance(weight, Tensor) or not weight.dim():
        return None
    if not is_matrix(module):
        return tuple(weight.shape) if weight.dim() == 1 else None
    same_kind = weight.shape[2:] == module.weight.shape[2:] and weight.dim() == module.weight.dim()
    return tuple(weight.flatten(1).shape) if same_kind else None


@dataclass(frozen=True)
class Change:
    """One module on its way to other widths."""

    name: str
    module: nn.Module
    remap: Remap
    topology: Topology | None
    """The new places of a sparse layer."""
    listeners: list[Listener]
    optimizers: tuple[Optimizer, ...]
    """The ones that follow without a session; one that is in a session too has followed already, and finds nothing to do."""
    tied: Mapping[str, list[tuple[nn.Module, str]]] = field(default_factory=dict)
    """Where else each parameter stands: other modules, and its names there."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The new shapes of tensors of a module that has no rows and columns."""

    def check(self) -> None:
        """Raise ValueError where something that is kept for the weights cannot follow."""
        for parameter_name, parameter in self.module.named_parameters(recurse=False):
            if self.remap.of(parameter_name) is not None:
                check_carry(self.optimizers, parameter)
        if isinstance(self.module, SparseLayer):
            assert self.topology is not None
            self.module.check_remap(self.topology, self.remap)  # which asks the sessions
        else:
            for listener in self.listeners:
                listener.check_remap(self.module, self.remap)

    @torch.no_grad()
    def make_(self) -> None:
        """Change the module; optimizers, methods and whatever else follows it move along."""
        old = dict(self.module.named_parameters(recurse=False))
        if isinstance(self.module, SparseLayer):
            assert self.topology is not None
            self.module.remap_(self.topology, self.remap)  # which calls the sessions
        else:
            self._move_dense(old)
            for listener in self.listeners:
                listener.remapped(self.module, old, self.remap)
        for name, before in old.items():
            if (part := self.remap.of(name)) is not None:
                carry_state(self.optimizers, before, getattr(self.module, name), part)
        for name, places in self.tied.items():
            for module, other in places:
                module._parameters[other] = self.module._parameters[name]
                note_sizes(module)

    def _move_dense(self, old: Mapping[str, nn.Parameter]) -> None:
        module: Any = self.module  # of one of several kinds
        rows = self.remap.rows
        if self.shapes:
            for name, before in old.items():
                if (part := self.remap.of(name)) is not None:
                    setattr(module, name, carried(before, part.apply(before.flatten()).view(self.shapes[name]), part))
            for name, buffer in module.named_buffers(recurse=False):
                if (part := self.remap.of(name)) is not None:
                    setattr(module, name, part.apply(buffer.flatten()).view(self.shapes[name]))
            note_sizes(module)
            return
        height, width = (*shape_of(module), 1)[:2]
        shape = self.remap.resized((height, width))
        for name, before in old.items():
            if (part := self.remap.of(name)) is not None:
                kernel = before.shape[2:]
                new_shape = (shape[0], shape[1] // prod(kernel), *kernel) if before.dim() > 1 else (shape[0],)
                setattr(module, name, carried(before, part.apply(before.flatten()).view(new_shape), part))
        for name, buffer in module.named_buffers(recurse=False):
            if rows is not None and buffer.dim() == 1:  # running statistics; the counter of batches is 0-d
                setattr(module, name, rows.apply(buffer))
        groups = shape[0] if groups_of(module) > 1 else 1  # depthwise
        if groups > 1:
            module.groups = groups
        sizes = (shape[0], shape[1] // prod(getattr(module, "kernel_size", ())) * groups)
        for name, size in zip(_NAMES[type(module)], sizes):
            setattr(module, name, size)


def _change(
    name: str,
    module: nn.Module,
    lines: Lines | Cuts,
    optimizers: tuple[Optimizer, ...],
    tied: Mapping[str, list[tuple[nn.Module, str]]],
) -> Change:
    topology, shapes = None, {}
    if not isinstance(lines, Lines) and (is_matrix(module) or type(module) in VECTORS) and not _is_grouped(module):
        lines = _as_lines(module, lines)
    if not isinstance(lines, Lines):
        tensors: dict[str, Any] = {**module._parameters, **module._buffers}
        parts = {own: cut(tensors[own].shape, kept) for own, kept in lines.items()}
        shapes = {
            own: tuple(kept[d].numel() if d in kept else n for d, n in enumerate(tensors[own].shape))
            for own, kept in lines.items()
        }
        remap = Remap(torch.zeros(0, dtype=torch.int64), 0, parts=parts)
    elif groups_of(module) > 1 and (lines.columns is not None or not is_depthwise(module)):
        raise ValueError(
            f"{name} is a convolution of {groups_of(module)} groups, each with channels of its own: "
            "only one without groups can lose or gain channels"
        )
    elif isinstance(module, SparseLayer):
        topology, remap = resize(module.topology, rows=lines.rows, columns=lines.columns)
    else:
        height, width = (*shape_of(module), 1)[:2]  # a norm has one column
        remap = resize_full((height, width), rows=lines.rows, columns=lines.columns)
    return Change(name, module, remap, topology, listeners_of(module), optimizers, tied, shapes)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a dense convolution has a kernel for each channel and no sums over channels."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels


def _is_grouped(module: nn.Module) -> bool:
    return groups_of(module) > 1 and not is_depthwise(module)


def _as_lines(module: nn.Module, cuts: Cuts) -> Lines:
    """Rows and columns of a weight as a matrix, of which each feature has as many columns as the kernel has places."""
    main = cuts.get("values" if isinstance(module, SparseLayer) else "weight", {})
    rows = main.get(0, next((kept[0] for kept in cuts.values() if 0 in kept), None))
    columns = main.get(1)
    if columns is not None and (each := shape_of(module)[1] // _features_in(module)) > 1:
        columns = (columns[:, None] * each + torch.arange(each)).flatten()
    return Lines(rows, columns)


def _features_in(module: Any) -> int:
    if isinstance(module, SparseConv2d):
        return module.geometry.weight_shape[1]
    return shape_of(module)[1] if isinstance(module, SparseLayer) else module.weight.shape[1]


def _owner(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    module, _, name = tensor.rpartition(".")
    return model.get_submodule(module), name


def note_sizes(module: Any) -> None:
    """Note the shape of its weight in a module's own numbers, which say how it is printed and checked."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.GroupNorm):
        each = module.num_channels // module.num_groups
        module.num_channels, module.num_groups = shape[0], shape[0] // each
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if isinstance(module, nn.Conv2d) and is_depthwise(module):
            module.groups = shape[0]
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
        module.nx, module.nf = shape
