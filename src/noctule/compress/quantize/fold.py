"""Batch norms folded into the convolutions and linear layers before them.

Jacob et al. 2018, arXiv 1712.05877, section 3.2.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from noctule.compress.quantize.layers import KINDS, check_evaluation, weight_of
from noctule.compress.quantize.numbers import spread
from noctule.core.convert import hooked
from noctule.sparse.layers import SparseLayer

Norm = nn.BatchNorm1d | nn.BatchNorm2d


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

    Pairs are found in the model, or in those parts of it, that `torch.fx` can trace. In evaluation the model computes what it did;
    trained on, it has no batch norms there.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    >>> fold_batch_norms(model)
    Folded(folded={'1': '0'}, left={'3': 'no linear layer or convolution lies right before it'})
    """
    check_evaluation(model.modules())
    modules, pairs, result = dict(model.named_modules()), _pairs(model), Folded()
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    holders = Counter(p for module in modules.values() for p in module.parameters(recurse=False))
    for name, norm in modules.items():
        if not isinstance(norm, Norm):
            continue
        if name not in pairs:
            result.left[name] = "no linear layer or convolution lies right before it"
            continue
        layer = modules[pairs[name]]
        twice = any(names[m] > 1 or any(holders[p] > 1 for p in m.parameters()) for m in (layer, norm))
        why = "it or the layer before it is used twice, or has a tied parameter" if twice else _obstacle(layer, norm)
        if why is not None:
            result.left[name] = why
            continue
        _fold(layer, norm)
        parent, _, own = name.rpartition(".")
        setattr(modules[parent], own, nn.Identity().eval())
        result.folded[name] = pairs[name]
    return result


def _pairs(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """Name of each batch norm -> of the layer whose output it alone reads."""
    try:
        graph = _Leaves().trace(model)
    except Exception:  # a forward that depends on its input can raise anything
        children = model.named_children()
        return {norm: layer for name, child in children for norm, layer in _pairs(child, f"{prefix}{name}.").items()}
    calls: list[Any] = [node for node in graph.nodes if node.op == "call_module"]
    count, pairs = Counter(node.target for node in calls), {}
    for node in calls:
        before: Any = node.args[0] if node.args else None
        if before in calls and isinstance(model.get_submodule(node.target), Norm):
            once = count[node.target] == count[before.target] == len(before.users) == 1
            if once and type(model.get_submodule(before.target)) in KINDS:
                pairs[prefix + node.target] = prefix + before.target
    return pairs


class _Leaves(fx.Tracer):
    """Looks into containers and modules of the model's own, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step of the graph."""
        return super().is_leaf_module(m, module_qualified_name) or isinstance(m, SparseLayer)


def _obstacle(layer: nn.Module, norm: Norm) -> str | None:
    """Why a batch norm cannot go into the layer before it."""
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no statistics: it normalises by each batch"
    if hooked(layer) or hooked(norm):
        return "it or the layer before it has hooks, which would see other numbers"
    if isinstance(layer, SparseLayer) and (layer.epilogue.slope != 1.0 or layer.epilogue.dropout):
        return "the layer before it has an activation or dropout fused"
    return None


def _fold(layer: Any, norm: Any) -> None:
    weight, topology = weight_of(layer)
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean * factor if norm.bias is None else norm.bias - norm.running_mean * factor
    weight.mul_(spread(factor.to(weight.dtype), weight, topology))
    if layer.bias is None:
        layer.register_parameter("bias", nn.Parameter(shift.to(weight.dtype).clone()))
    else:
        layer.bias.copy_(layer.bias * factor + shift)
