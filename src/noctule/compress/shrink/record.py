"""A record of what was removed, as JSON, and the way to give a freshly made model the same shape."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from noctule.compress.shrink.groups import columns_of
from noctule.compress.shrink.widths import Change, planned
from noctule.sparse.layers import SparseLayer
from noctule.sparse.layers.foreign import note_for_hugging_face

Record = list[dict[str, Any]]
"""Each step: ``cut``, name of a tensor -> dimension -> its size before and the lines that stay; ``numbers``, the module's own
numbers that count heads and the like: name -> the new one."""


def step_of(
    model: nn.Module, removed: Mapping[str, Mapping[int, Tensor]], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """The step of a record for these lines of these tensors (masks)."""
    kept = {
        tensor: {
            str(dimension): {"of": gone.numel(), "kept": (~gone).nonzero()[:, 0].tolist()}
            for dimension, gone in sorted(dimensions.items())
        }
        for tensor, dimensions in sorted(removed.items())
    }
    return {"cut": kept, "numbers": dict(numbers)}


def rebuild(model: nn.Module, record: Record) -> None:
    """Give a freshly made model the shape of one that was shrunk; then its state dict loads.

    Args:
        model: changed in place; what its weights are means nothing.
        record: what `shrink` returned as ``record``, of several calls one after the other.

    Raises:
        ValueError: it is a record of another model; nothing was changed.

    >>> from noctule.compress.shrink import shrink
    >>> def make():
    ...     return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = make()
    >>> record = shrink(model, 0.5, example=torch.rand(4, 3)).record
    >>> again = make()
    >>> rebuild(again, record)
    >>> again.load_state_dict(model.state_dict())
    <All keys matched successfully>
    """
    if not isinstance(record, list) or any(not isinstance(step, dict) for step in record):
        raise ValueError(f"a record is a list of steps, as shrink gives it, got {record!r:.200}")
    for step in record:
        apply(model, step)


def apply(model: nn.Module, step: Mapping[str, Any], *, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Make the changes of one step; all refusals come before anything moved."""
    for change in prepared(model, step, optimizers=optimizers):
        change.make_()
    for name, number in step["numbers"].items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, tuple(number) if isinstance(number, list) else number)
    note_for_hugging_face(model)


def prepared(
    model: nn.Module, step: Mapping[str, Any], *, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> list[Change]:
    """The checked changes of a step.

    Raises:
        ValueError: the model has no such tensor, or one of another size, or something that is kept for it cannot follow.
    """
    cuts: dict[str, dict[str, dict[int, Tensor]]] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    try:
        entries = [
            (tensor, int(dimension), int(entry["of"]), [int(line) for line in entry["kept"]])
            for tensor, dimensions in step["cut"].items()
            for dimension, entry in dimensions.items()
        ]
        for name in step["numbers"]:
            module, _, attribute = name.rpartition(".")
            if not isinstance(getattr(model.get_submodule(module), attribute), int | tuple):
                raise ValueError(f"{name} is no number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"this is no step of a record for this model: {error}") from error
    for tensor, dimension, size, kept in entries:
        module, _, own = tensor.rpartition(".")
        try:
            owner = model.get_submodule(module)
            found = {**owner._parameters, **owner._buffers}[own]
            assert found is not None
        except (AttributeError, KeyError, AssertionError):
            raise ValueError(f"the record is of another model: this one has no {tensor}") from None
        if (have := size_of(owner, found, dimension)) != size:
            raise ValueError(
                f"the record is of another model: {tensor} has {have} lines in dimension {dimension}, not {size}"
            )
        if not kept or sorted(set(kept)) != kept or not 0 <= kept[0] <= kept[-1] < size:
            raise ValueError(f"the record keeps lines of {tensor} that cannot be: {kept!r:.200}")
        cuts.setdefault(module, {}).setdefault(own, {})[dimension] = torch.tensor(kept)
    tied = {several[0]: several[1:] for several in names.values() if len(several) > 1}
    return planned(model, cuts, optimizers=optimizers, tied=tied)


def size_of(owner: nn.Module, tensor: Tensor, dimension: int) -> int:
    """How many lines a tensor has in a dimension, see `Cuts`."""
    if not isinstance(owner, SparseLayer):
        return tensor.shape[dimension] if dimension < tensor.dim() else 0
    if tensor is not owner.values:
        return tensor.numel()
    return owner.topology.shape[dimension] // (columns_of(owner) if dimension else 1)
