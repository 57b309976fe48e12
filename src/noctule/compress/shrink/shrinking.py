"""Remove neurons and channels for good: the widths shrink, and whatever is kept for them follows."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.compress.shrink.constants import fold_
from noctule.compress.shrink.readers import Paths, Reader, find_readers
from noctule.compress.shrink.widths import Lines, planned, shape_of
from noctule.sparse.layers.foreign import note_for_hugging_face


def shrink(
    model: nn.Module, keep: Mapping[str, Tensor], *, optimizers: Iterable[Optimizer] = (), paths: Paths | None = None
) -> dict[str, int]:
    """Keep only some neurons (or channels) of the named layers, and remove the others with both sides of their weights.

    Rows go from the layer, columns from the layer that reads it, and their part of every batch norm and PReLU between the two.
    What a removed neuron gives without incoming weights is its bias through what follows, the same for every sample: the
    reader takes that into its own bias, or into the running mean of a batch norm right behind it. So removing a neuron without
    incoming weights leaves the function in evaluation mode as it is, and removing any other does what setting those to zero would.
    Only at the border of an image that the reader pads with zeros is the constant added where it was not before. Several layers
    are taken one after the other, from the front.

    Layers are `SparseLinear`, `SparseConv2d`, ``nn.Linear`` and ``nn.Conv2d`` without groups. The reader of a layer is known inside
    `nn.Sequential`. In an open session the optimizers' state and the methods follow. Nothing is changed where anything is refused.

    Args:
        model: changed in place.
        keep: name of a layer -> which neurons stay, as a list of numbers or a mask (O,); they stay in their order.
        optimizers: the ones that train the model, where no open session does.
        paths: for what is decided in a forward: name of a layer -> the name of the one that reads it, or what its outputs pass,
            in order, as names and modules, that layer last. A module of an unknown kind among them is taken as elementwise.

    Returns:
        How many neurons each layer lost.

    Raises:
        ValueError: a layer's reader is not known, or something that is kept for its weights cannot follow; the text says why.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> shrink(model, {"0": torch.tensor([0, 2, 3])})
    {'0': 1}
    >>> model[0], model[2]
    (Linear(in_features=3, out_features=3, bias=True), Linear(in_features=3, out_features=2, bias=True))
    """
    found, left = find_readers(model, paths)
    readers = {name: _reader_of(name, found, left) for name in keep}
    removed = {name: ~_mask(name, keep[name], shape_of(model.get_submodule(name))[0]) for name in keep}
    removed = {name: mask for name, mask in removed.items() if mask.any()}
    changes = planned(model, lines_of(removed, readers), optimizers=optimizers)
    with ExitStack() as undo:
        for name in _front_to_back(removed, found):
            undo.callback(fold_(model.get_submodule(name), readers[name], removed[name]))
        undo.pop_all()
    for change in changes:
        change.make_()
    note_for_hugging_face(model)
    return {name: int(mask.sum()) for name, mask in removed.items()}


def lines_of(removed: Mapping[str, Tensor], readers: Mapping[str, Reader]) -> dict[str, Lines]:
    """Rows and columns that stay, by name of the module, where these neurons (masks, (O,)) go.

    Raises:
        ValueError: two layers are said to be read by the same one.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for name, mask in removed.items():
        kept, reader = (~mask).nonzero()[:, 0], readers[name]
        for lines, at, each in (
            (rows, name, 1),
            *((rows, passage.name, passage.each) for passage in reader.between if passage.each),
            (columns, reader.name, reader.columns),
        ):
            if at in lines:
                raise ValueError(f"{at} is said to follow {name} and another layer too: name one that reads it alone")
            lines[at] = (kept[:, None] * each + torch.arange(each, device=kept.device)).flatten()
    return {name: Lines(rows.get(name), columns.get(name)) for name in {**rows, **columns}}


def _reader_of(name: str, found: Mapping[str, Reader], left: Mapping[str, str]) -> Reader:
    if name in found:
        return found[name]
    if name in left:
        raise ValueError(f"{name or 'the model'} cannot lose neurons: {left[name]}")
    raise ValueError(f"{name!r} is no layer with neurons; there are {sorted({*found, *left})}")


def _mask(name: str, keep: Tensor, neurons: int) -> Tensor:
    """Which neurons stay, as a mask (O,) on the CPU."""
    keep = keep.detach().cpu()
    if keep.dtype == torch.bool and keep.shape == (neurons,):
        mask = keep
    else:
        mask = torch.zeros(neurons, dtype=torch.bool, device="cpu")
        numbers = keep.dim() == 1 and not keep.is_floating_point() and keep.dtype != torch.bool
        if not numbers or (keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < neurons):
            raise ValueError(
                f"keep[{name!r}] must be a list of numbers from 0 to {neurons - 1} or a mask of {neurons}, got {keep!r:.200}"
            )
        mask[keep.to(torch.int64)] = True
        if int(mask.sum()) != keep.numel():
            raise ValueError(f"keep[{name!r}] names a neuron twice: {keep.tolist()!r:.200}")
    if not mask.any():
        raise ValueError(f"keep[{name!r}] keeps no neuron: at least one must stay")
    return mask


def _front_to_back(names: Iterable[str], readers: Mapping[str, Reader]) -> list[str]:
    """Each layer before those that read it, directly or not."""

    def followers(name: str) -> int:
        passed: list[str] = []
        while (reader := readers.get(name)) is not None:
            if name in passed:
                raise ValueError(f"paths lead in a circle: {' -> '.join(passed)} -> {name}")
            passed.append(name)
            name = reader.name
        return len(passed)

    return sorted(names, key=followers, reverse=True)
