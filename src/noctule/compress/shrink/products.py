"""What products with weights, norms and attention do with labels of lines, see `noctule.compress.shrink.trace`.

Shapes: B samples, I features in, O out, C channels, H heads, T tokens, D features of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from noctule.compress.shrink.atoms import Value, Weight, varies
from noctule.compress.shrink.labels import Trace, module_of
from noctule.compress.shrink.operators import RULES, is_tensor, is_weight, per_channel, rule, shape_of


@rule("linear")
def linear(trace: Trace, node: Node, x: Any, weight: Any, bias: Any = None) -> Value:
    """Features (..., I) through a weight (O, I)."""
    return product(trace, node, x, weight, bias, rows=0, columns=1)


@rule("addmm")
def addmm(trace: Trace, node: Node, bias: Any, x: Any, weight: Any, **named: Any) -> Value:
    """Features (B, I) through a weight (I, O), as in `transformers`' Conv1D."""
    return product(trace, node, x, weight, bias, rows=1, columns=0)


@rule("matmul", "mm", "bmm")
def matmul(trace: Trace, node: Node, x: Any, y: Any) -> Value:
    """A product with a weight, or of two batches of matrices, whose common places in the batch go together."""
    if is_weight(y) and y.tensor.dim() == 2:
        return product(trace, node, x, y, None, rows=1, columns=0)
    a, b = trace.labels(x), trace.labels(y)
    shape = shape_of(node)
    if a is None or b is None or min(a.dim(), b.dim()) < 2:
        for labels in (a, b):
            if labels is not None:
                trace.lines.fix(labels, f"a product in {trace.where(node)} is not followed")
        return None
    trace.lines.tie(a[..., :1, :].transpose(-1, -2), b[..., :1])
    for labels, other in ((a, -2), (b, -1)):  # what the other dimension of each says is the result's
        if not varies(trace.lines.sets(labels), other):
            trace.lines.tie(labels, labels.narrow(other, 0, 1))
    a, b = trace.lines.sets(a), trace.lines.sets(b)
    if not varies(a, a.dim() - 1):  # along the sum all is one: a head, say
        trace.lines.tie(a[..., :1, :1], b[..., :1, :1])
        return torch.broadcast_to(b[..., :1, :] if varies(b, b.dim() - 1) else a[..., :1], shape)
    if varies(b, b.dim() - 1):
        return torch.broadcast_to(b[..., :1, :], shape)
    return torch.broadcast_to(a[..., :1], shape) if varies(a, a.dim() - 2) else None


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    trace: Trace,
    node: Node,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """Channels (B, C, ...) through kernels (O, C / groups, ...)."""
    channels = per_channel(trace, node, trace.labels(x), "a convolution")
    rows, columns = trace.lines_of(weight, 0), trace.lines_of(weight, 1)
    if groups > 1 and columns.numel() == 1:  # depthwise
        trace.lines.fix(columns, "a depthwise convolution has one channel a group")
        trace.lines.tie(rows.view(groups, -1), channels.view(groups, 1))
        trace.readers.setdefault(weight.name, node)
    else:
        trace.reading[weight.name] = 1
        trace.lines.tie(channels.view(groups, -1), columns)
        trace.lines.tie(rows.view(groups, -1), rows.view(groups, -1)[:1])
    return _written(trace, node, weight, bias, 0, 1)


@rule("conv_transpose2d")
def transposed(trace: Trace, node: Node, x: Any, weight: Any, bias: Any = None, *rest: Any) -> Value:
    """Channels (B, C, ...) through kernels (C, O / groups, ...)."""
    if len(rest) > 3 and rest[3] != 1:
        trace.lines.fix(trace.lines_of(weight, 0), "a transposed convolution has groups")
    trace.lines.tie(per_channel(trace, node, trace.labels(x), "a convolution"), trace.lines_of(weight, 0))
    return _written(trace, node, weight, bias, 1, 1)


@rule("embedding")
def embedding(trace: Trace, node: Node, weight: Any, indices: Any, *rest: Any) -> Value:
    """Rows of a table (V, O), by number."""
    trace.lines.fix(trace.lines_of(weight, 0), "its rows are looked up by number")
    trace.producers.add((weight.name, 1))
    return torch.broadcast_to(trace.lines_of(weight, 1), shape_of(node))


@rule("batch_norm")
def batch_norm(trace: Trace, node: Node, x: Any, *arguments: Any) -> Value:
    """One number of each sort for a channel, dimension 1."""
    labels = trace.labels(x)
    channels = per_channel(trace, node, labels, "a batch norm")
    for weight in arguments[:4]:
        if weight is not None:
            trace.lines.tie(trace.lines_of(weight, 0), channels)
    return labels


@rule("layer_norm", "rms_norm")
def layer_norm(trace: Trace, node: Node, x: Any, sizes: Sequence[int], *arguments: Any) -> Value:
    """Statistics of the last dimensions, of which there is to be one."""
    labels = trace.labels(x)
    if labels is None:
        return None
    last = _features(trace, labels)
    trace.norms.append((module_of(node), last))
    for weight in arguments:
        if is_weight(weight):
            if len(sizes) > 1:
                trace.lines.fix(labels, f"a norm of {len(sizes)} dimensions in {trace.where(node)} reads it")
                trace.lines.fix(trace.lines_of(weight, len(sizes) - 1), "it has several dimensions")
            else:
                trace.lines.tie(trace.lines_of(weight, 0), last)
    trace.lines.note_inexact(labels, f"the statistics of {module_of(node) or 'the model'} are of fewer features")
    return labels


@rule("group_norm")
def group_norm(
    trace: Trace, node: Node, x: Any, groups: int, weight: Any = None, bias: Any = None, *rest: Any
) -> Value:
    """Statistics of groups of channels, which stay or go as a whole."""
    labels = trace.labels(x)
    channels = per_channel(trace, node, labels, "a group norm")
    trace.lines.tie(channels.view(groups, -1), channels.view(groups, -1)[:, :1])
    for each in (weight, bias):
        if each is not None:
            trace.lines.tie(trace.lines_of(each, 0), channels)
    return labels


@rule("prelu")
def prelu(trace: Trace, node: Node, x: Any, weight: Any) -> Value:
    """A slope for all, or one for each channel."""
    labels = trace.labels(x)
    if weight.tensor.numel() > 1:
        trace.lines.tie(trace.lines_of(weight, 0), per_channel(trace, node, labels, "a PReLU"))
    return labels


@rule("scaled_dot_product_attention")
def attention(trace: Trace, node: Node, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any, **named: Any) -> Value:
    """Heads (B, H, T, D): queries' features go with keys', heads of both with values', whose features the result has."""
    queries, keys, values = map(trace.labels, (q, k, v))
    if queries is None or keys is None or values is None:
        for labels in (queries, keys, values):
            if labels is not None:
                trace.lines.fix(labels, f"the attention in {trace.where(node)} is not followed")
        return None
    queries, keys, values = queries[..., :1, :], keys[..., :1, :], values[..., :1, :]
    trace.lines.tie(queries, keys)
    whole = [trace.lines.sets(labels) for labels in (queries, values)]
    if not any(varies(labels, labels.dim() - 1) for labels in whole):
        trace.lines.tie(queries[..., :1], values[..., :1])
    bias = trace.labels(mask) if is_tensor(mask) else None
    if bias is not None and bias.dim() >= 3 and bias.shape[-3] > 1:
        trace.lines.tie(bias[..., :1, :1], queries[..., :1])
    return torch.broadcast_to(values, shape_of(node))


def sparse_linear(trace: Trace, node: Node, x: Any, values: Any, bias: Any, *rest: Any) -> Value:
    """Features (B, I) through a sparse weight; the result is feature-major, (O, B)."""
    shape = tuple(node.meta["val"][0].shape)
    _read(trace, node, trace.labels(x), values, 1)
    return torch.broadcast_to(_rows(trace, node, values, bias, 0)[:, None], shape), None, None


def sparse_convolution(trace: Trace, node: Node, x: Any, values: Any, bias: Any, *rest: Any) -> Value:
    """Channels (B, C, H, W) through sparse kernels; the result is (O, H, W, B)."""
    shape = tuple(node.meta["val"][0].shape)
    channels = per_channel(trace, node, trace.labels(x), "a convolution")
    groups = values.layer.geometry.groups
    columns, rows = trace.lines_of(values, 1), trace.lines_of(values, 0)
    if groups > 1:
        trace.lines.fix(torch.cat([channels, columns, rows]), "a sparse convolution of several groups reads it")
    else:
        trace.reading[values.name] = 1
        trace.lines.tie(channels, columns)
    return torch.broadcast_to(_rows(trace, node, values, bias, 0).view(-1, 1, 1, 1), shape), None, None


for _name, _function in (("sparse_linear", sparse_linear), ("sparse_conv2d", sparse_convolution)):
    RULES[getattr(torch.ops.noctule, _name)] = _function


def product(trace: Trace, node: Node, x: Any, weight: Any, bias: Any, *, rows: int, columns: int) -> Value:
    """Features (..., I) through a weight with these two dimensions."""
    if not is_weight(weight) or weight.layer is not None:
        for labels in map(trace.labels, (y for y in (x, weight, bias) if is_tensor(y))):
            if labels is not None:
                trace.lines.fix(labels, f"a product in {trace.where(node)} has a weight that is computed")
        return None
    _read(trace, node, trace.labels(x), weight, columns)
    return torch.broadcast_to(_rows(trace, node, weight, bias, rows), shape_of(node))


def _read(trace: Trace, node: Node, labels: Tensor | None, weight: Weight, dimension: int) -> None:
    """Tie the features that a weight reads to its lines."""
    lines = trace.lines_of(weight, dimension)
    trace.readers.setdefault(weight.name, node)
    trace.reading[weight.name] = dimension
    if labels is None:
        trace.lines.fix(lines, f"{weight.name} reads what belongs to no layer")
    else:
        trace.lines.tie(_features(trace, labels), lines)


def _rows(trace: Trace, node: Node, weight: Weight, bias: Any, dimension: int) -> Tensor:
    """The lines that a weight writes, with those of its bias."""
    lines = trace.lines_of(weight, dimension)
    trace.producers.add((weight.name, dimension))
    trace.readers.setdefault(weight.name, node)
    if is_weight(bias):
        trace.lines.tie(trace.lines_of(bias, 0), lines)
    return lines


def _written(trace: Trace, node: Node, weight: Weight, bias: Any, dimension: int, at: int) -> Tensor:
    shape = shape_of(node)
    rows = _rows(trace, node, weight, bias, dimension)
    return torch.broadcast_to(rows.view([-1 if d == at else 1 for d in range(len(shape))]), shape)


def _features(trace: Trace, labels: Tensor) -> Tensor:
    """The label of each feature, the last dimension; those at other places of a token or sample are tied to it."""
    first = labels.reshape(-1, labels.shape[-1])[0]
    if not torch.equal(torch.broadcast_to(first, labels.shape), labels):
        trace.lines.tie(labels, first)
    return first
