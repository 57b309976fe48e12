"""What torch's operators do with labels of lines, see `noctule.compress.shrink.trace`.

Shapes: B samples, I features in, O out, C channels, H heads, T tokens, D features of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from noctule.compress.shrink.atoms import FIXED, Value, Weight, varies
from noctule.compress.shrink.labels import Trace, module_of

aten = torch.ops.aten
RULES: dict[Any, Callable[..., Any]] = {}
"""Operator -> its rule, called with (trace, node, *arguments)."""


def _names(text: str) -> list[str]:
    return text.split()


_ELEMENTWISE = _names("""
    relu relu_ relu6 gelu silu silu_ mish tanh sigmoid hardtanh hardtanh_ hardswish hardswish_ hardsigmoid leaky_relu
    leaky_relu_ elu elu_ celu selu softplus logsigmoid threshold dropout dropout_ feature_dropout alpha_dropout add add_
    sub sub_ mul mul_ div div_ neg pow rsqrt sqrt exp log abs sign cos sin erf reciprocal clamp clamp_min clamp_max where
    masked_fill masked_fill_ minimum maximum eq ne ge gt le lt square round floor ceil nan_to_num rsub logical_not
    logical_and logical_or bitwise_and bitwise_or bitwise_not remainder fmod __and__ __or__ lerp addcmul isfinite isnan
""")
_MOVING = _names("""
    transpose permute t expand unsqueeze squeeze select slice split split_with_sizes chunk unbind cat stack narrow flip
    repeat movedim mT numpy_T expand_as tile roll index_select hsplit swapaxes
""")
_VIEWS = _names("""
    view reshape _unsafe_view unflatten flatten view_as
""")
_SAME = _names("""
    contiguous clone alias detach to _to_copy lift_fresh_copy lift_fresh type_as float half bfloat16 double dropout
    requires_grad_ detach_
""")
_NOTHING = _names("""
    arange zeros ones full empty zeros_like ones_like full_like empty_like new_ones new_zeros new_full new_empty
    scalar_tensor _assert_tensor_metadata sym_size rand randn rand_like randn_like bernoulli _assert_async
""")
_COUNTING = _names("""
    cumsum diff gather argmax argsort sort topk one_hot triu tril
""")


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for operators of these names, where this torch has them."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            if (packet := getattr(aten, name, None)) is not None:
                RULES[packet] = function
        return function

    return register


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of what a node gives."""
    return tuple(int(size) for size in node.meta["val"].shape)


def pick(trace: Trace, node: Node, several: Any, at: Any) -> Value:
    """One of several results."""
    return several[at] if isinstance(several, tuple | list) else several


@rule(*_NOTHING)
def nothing(trace: Trace, node: Node, *arguments: Any, **named: Any) -> Value:
    """A result that belongs to no line."""


@rule(*_COUNTING)
def counting(trace: Trace, node: Node, *arguments: Any, **named: Any) -> Value:
    """A result that belongs to no line, of what must stay, since its places count."""
    for labels in map(trace.labels, (x for x in arguments if is_tensor(x))):
        if labels is not None and any(varies(labels, d) for d in range(labels.dim())):
            trace.lines.fix(labels, f"{node.target} in {trace.where(node)} counts its places")


@rule(*_ELEMENTWISE)
def elementwise(trace: Trace, node: Node, *arguments: Any, **named: Any) -> Value:
    """Labels of the operands are tied where both depend on the place; one that is broadcast there depends on none."""
    shape = shape_of(node)
    given = [labels for x in (*arguments, *named.values()) if is_tensor(x) and (labels := trace.labels(x)) is not None]
    if not given:
        return None
    result = given[0]
    for labels in given[1:]:
        if _fixed(labels) or _fixed(result):
            fixed, other = (labels, result) if _fixed(labels) else (result, labels)
            if _meet(trace, fixed, other):
                trace.lines.tie(*torch.broadcast_tensors(fixed, other))
            result = torch.broadcast_to(other, torch.broadcast_shapes(fixed.shape, other.shape))
        else:
            result, labels = torch.broadcast_tensors(result, labels)
            together = _along(trace, result) & _along(trace, labels)
            if together:
                trace.lines.tie(result, labels)
            elif len(_along(trace, labels)) > len(_along(trace, result)):
                result = labels
    return torch.broadcast_to(result, shape)


@rule(*_MOVING)
def moving(trace: Trace, node: Node, *arguments: Any, **named: Any) -> Value:
    """The operator itself, on labels."""
    if not any(is_tensor(x) and trace.labels(x) is not None for x in _flat(arguments)):
        return None

    def labelled(x: Any, like: Any) -> Any:
        if isinstance(x, tuple | list):
            return [labelled(each, other) for each, other in zip(x, like, strict=True)]
        if isinstance(like, Node) and trace.labels(x) is None:
            return torch.full(shape_of(like), FIXED) if hasattr(like.meta.get("val"), "shape") else x
        return trace.labels(x) if isinstance(like, Node) else x

    given = [labelled(x, like) for x, like in zip(arguments, node.args, strict=True)]
    target: Any = node.target
    return target(*given, **named)


@rule(*_VIEWS)
def view(trace: Trace, node: Node, x: Any, *arguments: Any, **named: Any) -> Value:
    """Another shape; where features are split into dimensions, those that share an index of all but the last go together."""
    labels = trace.labels(x)
    if labels is None:
        return None
    old, new = tuple(labels.shape), shape_of(node)
    result = labels.reshape(new)
    for before, after in _segments(old, new):
        split = [d for d in after if new[d] > 1]
        if len(split) > 1 and any(varies(trace.lines.sets(labels), d) for d in before):
            inner = trace.lines.sets(result)
            if varies(inner, split[-1]):
                trace.lines.tie(inner, inner.narrow(split[-1], 0, 1))
    return result


@rule(*_SAME)
def same(trace: Trace, node: Node, x: Any, *arguments: Any, **named: Any) -> Value:
    """Each number where it was."""
    return x


@rule("softmax", "log_softmax", "_softmax")
def softmax(trace: Trace, node: Node, x: Any, dim: int, *rest: Any) -> Value:
    """All along a dimension count together."""
    labels = trace.labels(x)
    if labels is not None and varies(trace.lines.sets(labels), dim):
        trace.lines.fix(labels, f"a softmax over it in {trace.where(node)}")
    return labels


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm", "prod", "any", "all")
def reduction(trace: Trace, node: Node, x: Any, *arguments: Any, **named: Any) -> Value:
    """A sum or the like over some dimensions; over features it is a statistic, which changes without some."""
    labels = trace.labels(x)
    if labels is None or not hasattr(node.meta.get("val"), "shape"):
        return None
    shape, keep = shape_of(node), node.meta["val"].dim() == labels.dim()
    dims = next((a for a in arguments if isinstance(a, int | tuple | list) and not isinstance(a, bool)), None)
    if dims is None:
        dims = range(labels.dim())
    over = sorted({d % labels.dim() for d in ([dims] if isinstance(dims, int) else dims)}, reverse=True)
    if any(varies(trace.lines.sets(labels), d) for d in over):
        trace.lines.note_inexact(labels, f"the statistics of {module_of(node) or 'the model'} are of fewer features")
        return None
    for d in over:
        labels = labels.narrow(d, 0, 1) if keep else labels.select(d, 0)
    return torch.broadcast_to(labels, shape)


@rule(
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool1d", "avg_pool1d"),
    *(
        "adaptive_avg_pool1d",
        "adaptive_max_pool1d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "pad",
        "constant_pad_nd",
    ),
    *("pixel_unshuffle", "max_pool2d_with_indices"),
)
def pool(trace: Trace, node: Node, x: Any, *arguments: Any, **named: Any) -> Value:
    """Another image of the same channels."""
    channels = per_channel(trace, node, trace.labels(x), f"{node.target}")
    meta = node.meta["val"]
    shapes = [tuple(each.shape) for each in (meta if isinstance(meta, tuple | list) else [meta])]
    if any(shape[1] != channels.numel() for shape in shapes):
        trace.lines.fix(channels, f"{node.target} in {trace.where(node)} changes the number of channels")
        return None
    results = tuple(torch.broadcast_to(channels.view(-1, *[1] * (len(s) - 2)), s) for s in shapes)
    return results if isinstance(meta, tuple | list) else results[0]


def per_channel(trace: Trace, node: Node, labels: Tensor | None, what: str) -> Tensor:
    """The label of each channel, dimension 1; those of other samples and pixels are tied to it."""
    if labels is None:
        return torch.full((shape_of(node)[1] if hasattr(node.meta["val"], "shape") else 1,), FIXED)
    channels = labels.transpose(0, 1).reshape(labels.shape[1], -1)
    if not torch.equal(channels[:, :1].expand_as(channels), channels):
        trace.lines.tie(channels, channels[:, :1])
    return channels[:, 0]


def _along(trace: Trace, labels: Tensor) -> set[int]:
    """The dimensions, counted from the last, along which labels vary."""
    sets = trace.lines.sets(labels)
    return {d - labels.dim() for d in range(labels.dim()) if varies(sets, d)}


def _meet(trace: Trace, fixed: Tensor, other: Tensor) -> bool:
    """Whether what is fixed has numbers of its own along a dimension in which the other one varies."""
    return any(-d <= fixed.dim() and fixed.shape[d] > 1 for d in _along(trace, other))


def _fixed(labels: Tensor) -> bool:
    return bool((labels == FIXED).all())


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of the one shape become which of the other."""
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [i] if i < len(old) else [], [j] if j < len(new) else []
        a, b = old[i] if before else 1, new[j] if after else 1
        i, j = i + len(before), j + len(after)
        while a != b:
            if a < b:
                before.append(i)
                a, i = a * old[i], i + 1
            else:
                after.append(j)
                b, j = b * new[j], j + 1
        segments.append((before, after))
    return segments


def is_weight(x: Any) -> bool:
    """Whether a value is a parameter or buffer as itself."""
    return isinstance(x, Weight)


def is_tensor(x: Any) -> bool:
    """Whether a value is labels or a weight, and no constant."""
    return isinstance(x, Tensor) or is_weight(x)


def _flat(values: Any) -> list[Any]:
    return [x for value in values for x in _flat(value)] if isinstance(values, tuple | list) else [values]
