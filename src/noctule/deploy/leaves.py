"""What stands in for layers while a model is exported, so that each is one step of the graph whatever its forward does.

Shapes: B batch, I features or C channels in, O out, T tokens, E width of an attention.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from noctule.compress.quantize.integer_layer import IntegerLayer
from noctule.compress.quantize.layers import KINDS, widths_of
from noctule.sparse.layers import SparseAttention, SparseConv2d
from noctule.sparse.layers.attention import projections_of
from noctule.sparse.layers.convolution import Geometry


@torch.library.custom_op("noctule::layer", mutates_args=())
def layer(x: Tensor, name: str, widths: list[int], window: list[int]) -> Tensor:
    """The layer of this name, which a graph computes and torch does not: there is only a shape."""
    raise NotImplementedError("it is exported, not computed")


@layer.register_fake
def _(x: Tensor, name: str, widths: list[int], window: list[int]) -> Tensor:
    if not window:
        return x.new_empty(*x.shape[:-1], widths[1])
    geometry = Geometry(widths[0], widths[1], *window_of_list(window))
    return x.new_empty(x.shape[0], widths[1], *geometry.output_size((x.shape[2], x.shape[3])))


LAYER: Any = torch.ops.noctule.layer


class Leaf(nn.Module):
    """A linear layer or a convolution as one operator."""

    def __init__(self, name: str, original: Any) -> None:
        super().__init__()
        self.name, self.widths, self.window = name, [*widths_of_any(original)], window_of(original)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return layer(x, self.name, self.widths, self.window)


class PlainAttention(nn.Module):
    """Attention as its projections, each a step, and `scaled_dot_product_attention`; without masks."""

    in_proj_bias = None  # read by torch's encoder layers, which take their plain path then

    def __init__(self, original: Any, parts: list[nn.Module]) -> None:
        super().__init__()
        self.heads, self.batch_first = original.num_heads, original.batch_first
        self.query, self.key, self.value, self.out = parts

    @override
    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> tuple[Tensor, None]:
        masks = (*args[:1], *args[2:3], named.get("key_padding_mask"), named.get("attn_mask"))
        if any(mask is not None for mask in masks):
            raise ValueError("attention with a mask cannot be shipped to noctule.runtime: cut inputs to their length")
        inputs = (query, key, value) if self.batch_first else (x.transpose(0, 1) for x in (query, key, value))
        parts = zip((self.query, self.key, self.value), inputs, strict=True)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part, x in parts)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None


def with_leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Replace layers by leaves, in place; returns the layers by name."""
    layers: dict[str, nn.Module] = {}

    def replaced(module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, nn.MultiheadAttention | SparseAttention):
            return _attention(module, name, layers)
        if type(module) in KINDS or isinstance(module, IntegerLayer):
            layers[name] = module
            return Leaf(name, module)
        for own, child in module.named_children():
            setattr(module, own, replaced(child, f"{name}.{own}" if name else own))
        return module

    return {"": replaced(model, "")} | layers


def window_of(module: Any) -> list[int]:
    """Kernel, stride, padding, dilation and groups of a convolution, nothing for a linear layer."""
    g = module.geometry if isinstance(module, SparseConv2d | IntegerLayer) else None
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise ValueError(f"it pads with {module.padding_mode!r}, not with zeros")
        left, right, top, below = module._reversed_padding_repeated_twice
        sizes: Any = (module.kernel_size, module.stride, ((top, below), (left, right)), module.dilation, module.groups)
        g = Geometry(module.in_channels, module.out_channels, *sizes)
    return [] if g is None else [*g.kernel_size, *g.stride, *g.padding[0], *g.padding[1], *g.dilation, g.groups]


def widths_of_any(module: Any) -> tuple[int, int]:
    """Features or channels in and out."""
    return module.widths if isinstance(module, IntegerLayer) else widths_of(module)


def window_of_list(w: list[int]) -> tuple[Any, ...]:
    """The arguments of a convolution from the numbers of `window_of`."""
    return (w[0], w[1]), (w[2], w[3]), ((w[4], w[5]), (w[6], w[7])), (w[8], w[9]), w[10]


def _attention(module: Any, name: str, layers: dict[str, nn.Module]) -> nn.Module:
    if isinstance(module, SparseAttention):
        projections = [module.q_proj, module.k_proj, module.v_proj, module.out_proj]
    else:
        projections = projections_of(module)
    leaves: list[nn.Module] = []
    for own, part in zip(("q_proj", "k_proj", "v_proj", "out_proj"), projections, strict=True):
        layers[f"{name}.{own}"] = part
        leaves.append(Leaf(f"{name}.{own}", part))
    return PlainAttention(module, leaves)
