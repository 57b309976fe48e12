"""Batch norms folded into the convolutions and linear layers before them.

Jacob et al. 2018, arXiv 1712.05877, section 3.2.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from noctule.compress.quantize.numbers import spread
from noctule.compress.quantize.operation import KINDS, weight_of
from noctule.core.convert import hooked
from noctule.sparse.layers import SparseLayer

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Folded:
    """What `fold_batch_norms` did."""

    folded: dict[str, str] = field(default_factory=dict)
    """Name of a batch norm -> of the layer that it went into."""
    left: dict[str, str] = field(default_factory=dict)
    """Name of a batch norm -> why it stayed."""


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> Folded:
    """Multiply batch norms into the layers whose outputs they alone read, in place; an `nn.Identity` takes the place of each.

    Pairs are found inside `nn.Sequential`, and elsewhere where `torch.fx` can trace the model. In evaluation the model computes
    what it did; trained on, it has no batch norms there.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    >>> fold_batch_norms(model)
    Folded(folded={'1': '0'}, left={'3': 'no linear layer or convolution lies right before it'})
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, where batch norms are others: call model.eval() first")
    modules, result = dict(model.named_modules()), Folded()
    pairs = _pairs(model)
    for name, norm in modules.items():
        if not isinstance(norm, NORMS):
            continue
        layer = modules[pairs[name]] if name in pairs else None
        if layer is None:
            result.left[name] = "no linear layer or convolution lies right before it"
        elif (why := _obstacle(layer, norm)) is not None:
            result.left[name] = why
        else:
            _fold(layer, norm)
            parent, _, own = name.rpartition(".")
            setattr(modules[parent], own, nn.Identity().eval())
            result.folded[name] = pairs[name]
    return result


def _pairs(model: nn.Module) -> dict[str, str]:
    """Name of each batch norm -> of the layer whose output it alone reads."""
    try:
        graph = _Leaves().trace(model)
    except Exception:  # a forward that depends on its input can raise anything
        return _pairs_in_sequences(model)
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    modules, pairs = dict(model.named_modules()), {}
    for name, nodes in calls.items():
        before = nodes[0].args[0] if len(nodes) == 1 and nodes[0].args else None
        if isinstance(modules.get(name), NORMS) and isinstance(before, fx.Node) and before.op == "call_module":
            alone = len(before.users) == 1 and len(calls[str(before.target)]) == 1
            if alone and type(modules[str(before.target)]) in KINDS:
                pairs[name] = str(before.target)
    return pairs


class _Leaves(fx.Tracer):
    """Looks into containers and modules of the model's own, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step of the graph."""
        return super().is_leaf_module(m, module_qualified_name) or isinstance(m, SparseLayer)


def _pairs_in_sequences(model: nn.Module) -> dict[str, str]:
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    pairs = {}
    for name, sequence in model.named_modules():
        if type(sequence) is not nn.Sequential:
            continue
        children = list(sequence.named_children())
        for (first, layer), (second, norm) in zip(children, children[1:]):
            once = len(places[layer]) == 1 and len(places[norm]) == 1
            if isinstance(norm, NORMS) and type(layer) in KINDS and once:
                at = f"{name}." if name else ""
                pairs[at + second] = at + first
    return pairs


def _obstacle(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> str | None:
    """Why a batch norm cannot go into the layer before it."""
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no statistics: it normalises by each batch"
    if hooked(layer) or hooked(norm):
        return "it or the layer before it has hooks, which would see other numbers"
    if isinstance(layer, SparseLayer) and (layer.epilogue.slope != 1.0 or layer.epilogue.dropout):
        return "the layer before it has an activation or dropout fused"
    return None


def _fold(layer: Any, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    weight, topology = weight_of(layer)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    factor = (variance + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -mean * factor if norm.bias is None else norm.bias - mean * factor
    weight.mul_(spread(factor.to(weight.dtype), weight, topology))
    if layer.bias is None:
        layer.register_parameter("bias", nn.Parameter(shift.to(weight.dtype).clone()))
    else:
        layer.bias.copy_(layer.bias * factor + shift)
