"""What each operator of torch is in `noctule.runtime`: a rule that adds its steps and returns its value."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noctule.deploy.leaves import LAYER, window_of_list
from noctule.deploy.steps import Ref, Steps, tensor
from noctule.deploy.weights import array, grid_of_layer, made, weight_of_layer
from noctule.runtime.operators import (
    Activation,
    Clamp,
    Concat,
    Conv2d,
    Embedding,
    LayerNorm,
    Linear,
    MatMul,
    Mean,
    Operator,
    Pointwise,
    Pool,
    Reshape,
    Slice,
    Softmax,
)

aten: Any = torch.ops.aten
HIDDEN = -1e30
"""What is added to scores that count as nothing: exp() of it is 0 beside any other score."""


def _layer(g: Steps, x: Ref, name: str, widths: list[int], window: list[int]) -> Ref:
    module: Any = g.layers[name]
    g.name = name
    weight, grid = weight_of_layer(module), grid_of_layer(module)
    bias = None if module.bias is None else array(module.bias.float())
    slope = getattr(module, "slope", None)
    if slope is None:
        slope = module.epilogue.slope if hasattr(module, "epilogue") else 1.0
    if grid is not None:
        x = g.codes(x, grid)
    if not window:
        return _last_axis(g, x, Linear(weight, bias, slope))
    return _images(g, x, Conv2d(weight, bias, slope, None, *window_of_list(window)))


def _last_axis(g: Steps, x: Ref, operator: Operator) -> Ref:
    if x.batch == len(g.shape(x)):
        raise ValueError("it works along the batch")
    return g.add(operator, x)


def _images(g: Steps, x: Ref, operator: Operator) -> Ref:
    if x.batch != 0 or len(g.shape(x)) != 3:
        raise ValueError(f"it reads images (B, C, H, W), not {g.shape(x)}")
    return g.add(operator, x)


def _linear(g: Steps, x: Ref, weight: Any, bias: Any = None) -> Ref:
    w = tensor(weight)
    of = made((w.shape[0], w.shape[1]), array(w.float()).reshape(-1), None, None, blocks=True)
    return _last_axis(g, x, Linear(of, None if bias is None else array(tensor(bias).float())))


def _conv2d(
    g: Steps,
    x: Ref,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Ref:
    w = tensor(weight)
    of = made((w.shape[0], w[0].numel()), array(w.float()).reshape(-1), None, None, blocks=False)
    (down, right), (top, left) = _pair(stride), _pair(padding)
    window = (w.shape[2], w.shape[3]), (down, right), ((top, top), (left, left)), _pair(dilation), groups
    return _images(g, x, Conv2d(of, None if bias is None else array(tensor(bias).float()), 1.0, None, *window))


def _batch_norm(
    g: Steps, x: Ref, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: Any, eps: float, *_: Any
) -> Ref:
    if training or mean is None:
        raise ValueError("it normalises by each batch")
    scale = (var + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    rest = [1] * (len(g.shape(x)) - 1)
    return g.affine(x, scale.view(1, -1, *rest), shift.view(1, -1, *rest))


def _layer_norm(
    g: Steps, x: Ref, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Ref:
    count, sample = math.prod(shape), g.shape(x)
    if x.batch > len(sample) - len(shape):
        raise ValueError("it normalises along the batch")
    w = np.ones(count, np.float32) if weight is None else array(weight.float()).reshape(-1)
    b = np.zeros(count, np.float32) if bias is None else array(bias.float()).reshape(-1)
    flat = x if len(shape) == 1 else g.add(Reshape((*sample[: -len(shape)], count)), x)
    y = g.add(LayerNorm(w, b, eps), flat)
    return y if len(shape) == 1 else g.add(Reshape(sample), y)


def _add(g: Steps, x: Any, y: Any, *, alpha: float = 1.0) -> Ref:
    if isinstance(x, Ref) and isinstance(y, Ref):
        return _both(g, "add", x, y if alpha == 1.0 else g.affine(y, alpha, 0.0))
    return g.affine(x, 1.0, y * alpha) if isinstance(x, Ref) else g.affine(y, alpha, x)


def _sub(g: Steps, x: Any, y: Any, *, alpha: float = 1.0) -> Ref:
    return _add(g, x, y, alpha=-alpha)


def _mul(g: Steps, x: Any, y: Any) -> Ref:
    if isinstance(x, Ref) and isinstance(y, Ref):
        return _both(g, "multiply", x, y)
    return g.affine(x, y, 0.0) if isinstance(x, Ref) else g.affine(y, x, 0.0)


def _div(g: Steps, x: Any, y: Any) -> Ref:
    if isinstance(y, Ref):
        raise ValueError("it divides by what depends on the input")
    return g.affine(x, 1.0 / y, 0.0)


def _both(g: Steps, how: Any, x: Ref, y: Ref) -> Ref:
    if g.shape(x) != g.shape(y) or x.batch != y.batch:
        raise ValueError(f"values of shapes {g.shape(x)} and {g.shape(y)} meet: only those of one shape can")
    return g.add(Pointwise(how), x, y)


def _mean(g: Steps, x: Ref, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Ref:
    axes = sorted(g.axis(x, d) for d in (dim if dim is not None else range(1, len(g.shape(x)) + 1)))
    if axes != [*range(axes[0], axes[-1] + 1)]:
        raise ValueError(f"it averages along axes {axes}, which do not follow one another")
    gone = 0 if dim is None else sum(d % (len(g.shape(x)) + 1) < x.batch for d in dim)
    y = g.add(Mean(axes[0], axes[-1]), x, batch=x.batch - gone)
    return g.reshape(y) if keepdim else y


def _adaptive_mean(g: Steps, x: Ref, size: Any) -> Ref:
    (high, wide), image = _pair(size), g.shape(x)[1:]
    if (high, wide) == (1, 1):
        return g.reshape(g.add(Mean(1, 2), x))
    if image[0] % high or image[1] % wide:
        raise ValueError(f"windows of different sizes: {image} pixels to {(high, wide)}")
    step = (image[0] // high, image[1] // wide)
    return _images(g, x, Pool("mean", step, step))


def _max_pool(
    g: Steps, x: Ref, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Ref:
    if ceil_mode or _pair(dilation) != (1, 1):
        raise ValueError("pooling with ceil_mode or dilation")
    return _pool(g, x, "max", kernel, stride, padding)


def _mean_pool(
    g: Steps,
    x: Ref,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Ref:
    if ceil_mode or divisor_override is not None:
        raise ValueError("pooling with ceil_mode or divisor_override")
    return _pool(g, x, "mean" if count_include_pad else "mean inside", kernel, stride, padding)


def _pool(g: Steps, x: Ref, how: str, kernel: Any, stride: Any, padding: Any) -> Ref:
    top, left = _pair(padding)
    size = _pair(kernel)
    return _images(g, x, Pool(how, size, _pair(stride) if stride else size, ((top, top), (left, left))))


def _softmax(g: Steps, x: Ref, dim: int, *_: Any, **__: Any) -> Ref:
    return g.add(Softmax(g.axis(x, dim)), x)


def _matmul(g: Steps, x: Any, y: Any) -> Ref:
    if not isinstance(x, Ref):
        raise ValueError("a constant matrix times what depends on the input")
    if not isinstance(y, Ref):
        return (
            _linear(g, x, y.transpose(-1, -2).contiguous())
            if y.dim() == 2
            else _refuse("products with constant batches")
        )
    if x.batch != y.batch or x.batch > len(g.shape(x)) - 2:
        raise ValueError("a product whose matrices contain the batch")
    return g.add(MatMul(), x, y)


def _attention(
    g: Steps,
    q: Ref,
    k: Ref,
    v: Ref,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    **_: Any,
) -> Ref:
    scores = g.add(MatMul(True, scale or g.shape(q)[-1] ** -0.5), q, k)
    if attn_mask is not None:
        scores = g.affine(scores, 1.0, _added(tensor(attn_mask)))
    return g.add(MatMul(), g.add(Softmax(len(g.shape(scores)) - 1, is_causal), scores), v)


def _added(mask: Tensor) -> Tensor:
    """A mask of attention as what is added to the scores, all of it finite."""
    added = torch.where(mask, 0.0, HIDDEN) if mask.dtype is torch.bool else mask.float().clamp(HIDDEN, -HIDDEN)
    if (added.amax(-1) <= HIDDEN).any():
        raise ValueError("attention with a mask that hides all keys of a query")
    return added


def _embedding(g: Steps, table: Any, x: Ref, *_: Any) -> Ref:
    return g.add(Embedding(np.ascontiguousarray(array(tensor(table).float()))), x)


def _slice(g: Steps, x: Ref, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Ref:
    rank = len(g.shape(x)) + 1
    if dim % rank == x.batch and start in (None, 0) and (isinstance(end, torch.SymInt) or end is None or end > 2**31):
        return x
    axis = g.axis(x, dim)
    size = g.shape(x)[axis]
    first, last, by = slice(start, end, step).indices(size)
    if by != 1:
        raise ValueError(f"it takes every {by}th place")
    return x if (first, last) == (0, size) else g.add(Slice(axis, first, last), x)


def _select(g: Steps, x: Ref, dim: int, index: int) -> Ref:
    axis = g.axis(x, dim)
    index %= g.shape(x)[axis]
    return g.reshape(g.add(Slice(axis, index, index + 1), x))


def _parts(g: Steps, x: Ref, sizes: list[int], dim: int) -> list[Ref]:
    axis, at = g.axis(x, dim), 0
    parts = []
    for size in sizes:
        parts.append(g.add(Slice(axis, at, at + size), x))
        at += size
    return parts


def _split(g: Steps, x: Ref, size: Any, dim: int = 0) -> list[Ref]:
    whole = g.shape(x)[g.axis(x, dim)]
    sizes = [*size] if isinstance(size, list | tuple) else [min(size, whole - at) for at in range(0, whole, size)]
    return _parts(g, x, sizes, dim)


def _chunk(g: Steps, x: Ref, chunks: int, dim: int = 0) -> list[Ref]:
    return _split(g, x, -(-g.shape(x)[g.axis(x, dim)] // chunks), dim)


def _unbind(g: Steps, x: Ref, dim: int = 0) -> list[Ref]:
    axis = g.axis(x, dim)
    batch = x.batch - (dim % (len(g.shape(x)) + 1) < x.batch)
    rest = (*g.shape(x)[:axis], *g.shape(x)[axis + 1 :])
    return [g.add(Reshape(rest), part, batch=batch) for part in _parts(g, x, [1] * g.shape(x)[axis], dim)]


def _cat(g: Steps, values: Sequence[Any], dim: int = 0) -> Ref:
    like = next(v for v in values if isinstance(v, Ref))
    refs = [v if isinstance(v, Ref) else g.constant(v, like) for v in values]
    if any(r.batch != like.batch for r in refs):
        raise ValueError("it joins values whose batch lies in different places")
    return g.add(Concat(g.axis(like, dim)), *refs)


def _expand(g: Steps, x: Any, size: Sequence[Any], **_: Any) -> Any:
    if isinstance(x, Ref):
        pairs = zip(size, _whole(g, x), strict=False)
        same = all(isinstance(n, torch.SymInt) or n in (-1, m) for n, m in pairs)
        return x if same else _refuse("repeating values")
    return x.expand([1 if isinstance(n, torch.SymInt) else n for n in size])


def _whole(g: Steps, x: Ref) -> list[int]:
    shape = [*g.shape(x)]
    shape.insert(x.batch, -1)
    return shape


def _transpose(g: Steps, x: Ref, a: int, b: int) -> Ref:
    order = [*range(len(g.shape(x)) + 1)]
    order[a], order[b] = order[b], order[a]
    return g.permute(x, order)


def _permute(g: Steps, x: Ref, order: Sequence[int]) -> Ref:
    rank = len(g.shape(x)) + 1
    return g.permute(x, [a % rank for a in order])


def _size(g: Steps, x: Ref, dim: int) -> Any:
    assert g.node is not None
    return g.node.meta["val"]


def _refuse(what: str) -> Any:
    raise ValueError(what)


def _pair(x: Any) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else (x[0], x[-1])


def _same(g: Steps, x: Any, *_: Any, **__: Any) -> Any:
    return x


def _reshape(g: Steps, x: Any, *_: Any) -> Any:
    return g.reshape(x) if isinstance(x, Ref) else _refuse("a constant in a shape that depends on the batch")


def _each(make: Callable[..., Operator]) -> Callable[..., Ref]:
    return lambda g, x, *arguments, **named: g.add(make(*arguments, **named), x)


def _to(g: Steps, x: Any, *arguments: Any, **named: Any) -> Any:
    assert g.node is not None
    after, before = g.node.meta["val"].dtype, "tokens" if g.values[x.number].kind == "tokens" else "float32"
    return x if after.is_floating_point == (before == "float32") else _refuse(f"numbers become {after}")


RULES: dict[Any, Callable[..., Any]] = {
    LAYER: _layer,
    aten.linear: _linear,
    aten.conv2d: _conv2d,
    aten.batch_norm: _batch_norm,
    aten.layer_norm: _layer_norm,
    aten.add: _add,
    aten.add_: _add,
    aten.sub: _sub,
    aten.mul: _mul,
    aten.div: _div,
    aten.neg: lambda g, x: g.affine(x, -1.0, 0.0),
    aten.mean: _mean,
    aten.adaptive_avg_pool2d: _adaptive_mean,
    aten.max_pool2d: _max_pool,
    aten.avg_pool2d: _mean_pool,
    aten.softmax: _softmax,
    aten.matmul: _matmul,
    aten.bmm: _matmul,
    aten.scaled_dot_product_attention: _attention,
    aten.embedding: _embedding,
    aten.slice: _slice,
    aten.select: _select,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.chunk: _chunk,
    aten.unbind: _unbind,
    aten.cat: _cat,
    aten.expand: _expand,
    aten.transpose: _transpose,
    aten.mT: lambda g, x: _transpose(g, x, -2, -1),
    aten.permute: _permute,
    aten.sym_size: _size,
    aten.relu: _each(lambda: Clamp(0.0)),
    aten.relu_: _each(lambda: Clamp(0.0)),
    aten.leaky_relu: _each(lambda negative_slope=0.01: Clamp(negative_slope)),
    aten.hardtanh: _each(lambda min_val=-1.0, max_val=1.0: Clamp(1.0, float(min_val), float(max_val))),
    aten.hardtanh_: _each(lambda min_val=-1.0, max_val=1.0: Clamp(1.0, float(min_val), float(max_val))),
    aten.relu6: _each(lambda: Clamp(0.0, 0.0, 6.0)),
    aten.gelu: _each(lambda approximate="none": Activation("gelu" if approximate == "none" else "gelu_tanh")),
    aten.silu: _each(lambda: Activation("silu")),
    aten.silu_: _each(lambda: Activation("silu")),
    aten.sigmoid: _each(lambda: Activation("sigmoid")),
    aten.tanh: _each(lambda: Activation("tanh")),
    aten.hardswish: _each(lambda: Activation("hardswish")),
    aten.hardswish_: _each(lambda: Activation("hardswish")),
    **dict.fromkeys((aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze), _reshape),
    **dict.fromkeys((aten.dropout, aten.contiguous, aten.clone, aten.alias, aten.detach), _same),
    **dict.fromkeys((aten.to, aten._to_copy), _to),
}
