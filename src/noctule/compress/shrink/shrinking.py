"""Remove neurons and channels for good: the widths shrink, and whatever is kept for them follows."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.compress.shrink.constants import fold_
from noctule.compress.shrink.following import Following
from noctule.compress.shrink.groups import Score, columns_of, magnitude
from noctule.compress.shrink.readers import Paths, Reader, find_readers
from noctule.compress.shrink.record import Record, step_of
from noctule.compress.shrink.widths import Lines, planned, shape_of
from noctule.sparse.layers import SparseLayer
from noctule.sparse.layers.foreign import note_for_hugging_face


class Shrunk(dict[str, int]):
    """What `shrink` did: how many features each layer lost, by its name."""

    record: Record
    """The same as JSON, for `rebuild`: give it to `save_model` in the structure."""
    whole: dict[str, str]
    """Groups of layers that stayed as they were, by the name of the first layer, and why."""
    left: dict[str, str]
    """Layers that can lose no feature, and why."""
    inexact: dict[str, str]
    """Layers without some of whose features others compute something else, and what: the statistics of a layer norm, say."""


def shrink(
    model: nn.Module,
    keep: Mapping[str, Tensor] | float,
    *,
    example: Any = None,
    score: Score = magnitude,
    round_to: int = 1,
    skip: Sequence[str] = (),
    optimizers: Iterable[Optimizer] = (),
    paths: Paths | None = None,
) -> Shrunk:
    """Keep only some neurons, channels, heads or features, and remove the others with all sides of their weights.

    With ``example`` the model may be any that `torch.export` can follow: what is tied by a residual sum, a concatenation, a head,
    a grouped or depthwise convolution or a shared weight goes together (see `noctule.compress.shrink.trace`). Without it the reader
    of a layer is known inside `nn.Sequential`, or by ``paths``.

    What a removed feature gives without incoming weights is its bias through what follows, the same for every sample: its readers
    take that into their own biases, or into the running mean of a batch norm right behind. So removing a feature without incoming
    weights leaves the function in evaluation mode as it is, and removing any other does what setting those to zero would. Where
    that cannot be (the statistics of a layer norm in a residual stream), ``inexact`` says so. At the border of an image that a
    reader pads with zeros the constant is added where it was not before.

    In an open session the optimizers' state and the methods follow. Nothing is changed where anything is refused.

    Args:
        model: changed in place.
        keep: name of a layer -> which features stay, as a list of numbers or a mask (O,), in their order; or with an example the
            share of the units of every group that stays, in (0, 1].
        example: arguments of the model's forward: a tensor, a tuple, or a mapping of keyword arguments.
        score: says which units stay, where ``keep`` is a share.
        round_to: the numbers of features that stay are multiples of this; a group that loses none for it is in ``whole``.
        skip: layers whose groups are left alone, where ``keep`` is a share.
        optimizers: the ones that train the model, where no open session does.
        paths: for what is decided in a forward and cannot be exported: name of a layer -> the name of the one that reads it, or
            what its outputs pass, in order, as names and modules, that layer last. A module of an unknown kind is taken as
            elementwise.

    Returns:
        How many features each layer lost, and more, see `Shrunk`.

    Raises:
        ValueError: it is not known what a layer's features are tied to, or something that is kept for its weights cannot follow, or
            the model cannot be exported, or would not run; the text says why.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> shrink(model, {"0": torch.tensor([0, 2, 3])})
    {'0': 1}
    >>> model[0], model[2]
    (Linear(in_features=3, out_features=3, bias=True), Linear(in_features=3, out_features=2, bias=True))
    >>> shrink(nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2)), 0.25, example=torch.rand(5, 3))
    {'0': 30}
    """
    if example is not None:
        if paths is not None:
            raise ValueError("give example= or paths=, not both: an example shows what paths would say")
        return _followed(model, keep, example, score, round_to, skip, tuple(optimizers))
    if not isinstance(keep, Mapping):
        raise ValueError(f"keep={keep!r} is a share of what an example shows: give example=, or name the layers")
    found, left = find_readers(model, paths)
    readers = {name: _reader_of(name, found, left) for name in keep}
    removed = {name: ~_mask(name, keep[name], shape_of(model.get_submodule(name))[0]) for name in keep}
    removed = {name: mask for name, mask in removed.items() if mask.any()}
    lines = lines_of(removed, readers)
    changes = planned(model, lines, optimizers=optimizers)
    step = _step(model, lines)
    with ExitStack() as undo:
        for name in _front_to_back(removed, found):
            undo.callback(fold_(model.get_submodule(name), readers[name], removed[name]))
        undo.pop_all()
    for change in changes:
        change.make_()
    note_for_hugging_face(model)
    return _shrunk({name: int(mask.sum()) for name, mask in removed.items()}, step, left=left)


def _followed(
    model: nn.Module,
    keep: Mapping[str, Tensor] | float,
    example: Any,
    score: Score,
    round_to: int,
    skip: Sequence[str],
    optimizers: tuple[Optimizer, ...],
) -> Shrunk:
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    if not isinstance(keep, Mapping) and not 0.0 < keep <= 1.0:
        raise ValueError(f"a share to keep must lie in (0, 1], got {keep}: something must stay")
    following = Following(model, example)
    if isinstance(keep, Mapping):
        sizes = following.sizes()
        if unknown := [name for name in keep if name not in sizes]:
            raise ValueError(f"{unknown} are no layers that make features; there are {sorted(sizes)}")
        removal = following.named({name: ~_mask(name, kept, sizes[name]) for name, kept in keep.items()})
    else:
        removal = following.chosen(keep, score, round_to, skip)
    following.make_(removal, optimizers)
    return _shrunk(removal.lost, removal.step, removal.whole, following.left, removal.inexact)


def _shrunk(lost: dict[str, int], step: dict[str, Any], whole: Any = (), left: Any = (), inexact: Any = ()) -> Shrunk:
    result = Shrunk(lost)
    result.record = [step] if step["cut"] else []
    result.whole, result.left, result.inexact = dict(whole), dict(left), dict(inexact)
    return result


def _step(model: nn.Module, lines: Mapping[str, Lines]) -> dict[str, Any]:
    """The step of a record for these rows and columns."""
    removed: dict[str, dict[int, Tensor]] = {}
    for name, (rows, columns) in lines.items():
        module, prefix = model.get_submodule(name), f"{name}." if name else ""
        sizes = (*shape_of(module), 1)[:2]
        if rows is not None:
            tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for own, tensor in tensors.items():
                if tensor.dim():
                    removed.setdefault(prefix + own, {})[0] = _but(rows, sizes[0])
        if columns is not None:
            own, each = "values" if isinstance(module, SparseLayer) else "weight", columns_of(module)
            removed.setdefault(prefix + own, {})[1] = _but(columns[::each] // each, sizes[1] // each)
    return step_of(model, removed, {})


def _but(kept: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept.cpu()] = False
    return gone


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
