"""The constant output of a neuron without incoming weights, folded into the next layer when the neuron is removed.

Such a neuron gives the same for every sample: its bias, through whatever follows. Its reader multiplies that by a weight and adds
it up, which is what a bias is for.

Shapes: O neurons, I columns of the reader, R its rows.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule.compress.shrink.readers import POOLS, Reader, is_convolution
from noctule.compress.shrink.widths import shape_of
from noctule.sparse.layers import SparseLayer


@torch.no_grad()
def constants(producer: Any, reader: Reader) -> Tensor:
    """What the reader's columns (I,) see in evaluation mode of neurons whose incoming weights are all zero."""
    bias, weight = producer.bias, next(producer.parameters(recurse=False))
    x = weight.new_zeros(shape_of(producer)[0]) if bias is None else bias
    if isinstance(producer, SparseLayer):
        x = F.leaky_relu(x, producer.epilogue.slope)
    x = x.repeat(2, 1)  # two samples: a norm without running statistics wants more than one
    if is_convolution(producer):
        x = x[:, :, None, None]
    each = 1
    for passage in reader.between:
        if passage.each > each:  # the pixels of a channel, flattened
            x, each = x.repeat_interleave(passage.each // each, 1), passage.each
        if not isinstance(passage.module, POOLS):
            x = copy.deepcopy(passage.module).eval()(x)
    return x[0].flatten().repeat_interleave(reader.columns // each)


@torch.no_grad()
def fold_(producer: nn.Module, reader: Reader, removed: Tensor) -> Callable[[], object]:
    """Add what these neurons (a mask, (O,)) give without incoming weights to the reader's own bias.

    Returns a function that undoes it.

    Raises:
        ValueError: the reader has no bias, nor a batch norm right behind it.
    """
    given = constants(producer, reader).double()
    added = _product(reader.layer, torch.where(removed.to(given.device).repeat_interleave(reader.columns), given, 0.0))
    target = _target(reader)
    if not added.any():
        return lambda: None
    if target is None:
        raise ValueError(
            f"{reader.name} would have to add what the removed neurons give without their weights, but has no bias, nor a "
            "batch norm with running statistics right behind it: give it one"
        )
    before = target.tensor.clone()
    target.tensor.copy_(target.tensor.double() + target.sign * added)
    return lambda: target.tensor.data.copy_(before)


def can_take(producer: nn.Module, reader: Reader) -> bool:
    """Whether `fold_` will never raise, however training moves what there is."""
    if _target(reader) is not None:
        return True
    return producer.bias is None and not any(p.each for p in reader.between) and not constants(producer, reader).any()


class _Target(NamedTuple):
    tensor: Tensor
    sign: int


def _target(reader: Reader) -> _Target | None:
    """What is added to all outputs of the reader: its bias, or (with the other sign) the mean that a norm subtracts."""
    layer: Any = reader.layer
    behind: Any = reader.behind
    if layer.bias is not None:
        return _Target(layer.bias, 1)
    straight = not isinstance(layer, SparseLayer) or layer.epilogue.slope == 1.0
    if straight and type(behind) in (nn.BatchNorm1d, nn.BatchNorm2d) and behind.running_mean is not None:
        return _Target(behind.running_mean, -1)
    return None


def _product(layer: Any, x: Tensor) -> Tensor:
    """W x, (R,), of x (I,) that is mostly zero; a convolution's with its padding taken for more of the same."""
    if isinstance(layer, SparseLayer):
        terms = layer.values.double() * x[layer.topology.columns.to(torch.int64)]
        return x.new_zeros(layer.topology.shape[0]).index_add_(0, layer.topology.rows(), terms)
    at = x.nonzero()[:, 0]
    return layer.weight.flatten(1)[:, at].double() @ x[at]
