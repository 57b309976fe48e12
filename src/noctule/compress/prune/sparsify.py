"""Make masked layers truly sparse, with the state of their optimizers."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from noctule.core.convert import Conversion, Leave, convert_, hooked
from noctule.core.listeners import listeners_of
from noctule.core.optim import carry_state, check_carry, unwrapped
from noctule.core.remap import Remap
from noctule.sparse.layers import SparseConv2d, SparseLayer, SparseLinear
from noctule.sparse.layers.to_sparse import parts_of

SPARSE_BELOW = 0.3
"""The density below which a sparse layer beats oneDNN's dense float32 in a training step (see measured figures)."""


def sparsify_(
    model: nn.Module, *, below: float = SPARSE_BELOW, optimizers: Optimizer | Iterable[Optimizer] = ()
) -> Conversion:
    """Replace each `nn.Linear` and `nn.Conv2d` with enough zeros by the sparse layer of its non-zeros.

    The function stays what it is. Where optimizers are named, their state goes with the weights that stay. Call it when training is
    over, or between two sessions.

    Args:
        model: changed in place.
        below: layers with this share of non-zeros or more stay dense; 1.0 converts whatever has a zero. Bytes fall below two
            thirds, time below about a third (``noctule bench layers`` prints the crossing of a machine).
        optimizers: the ones that train the model.

    Raises:
        ValueError: a session is open on the model, or an optimizer's state cannot follow; nothing was changed.
    """
    if not 0.0 < below <= 1.0:
        raise ValueError(f"below must lie in (0, 1], got {below}")
    if listeners_of(model):
        raise ValueError("sparsify_ replaces layers, which an open session holds: close the session, then attach again")
    given = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
    inner = [each for optimizer in given for each in unwrapped(optimizer)]
    rule = _NonZeros(below)
    dense: Any
    for dense in model.modules():
        if rule.takes(dense):
            check_carry(inner, dense.weight)
    conversion = convert_(model, rule)
    there = {*conversion.model.modules()}
    for dense, sparse in rule.made:
        if sparse not in there:  # its weight is tied
            continue
        keys, places = sparse.topology.keys(), dense.weight.numel()
        carry_state(inner, dense.weight, sparse.values, Remap(keys, places))
        if dense.weight.grad is not None:
            sparse.values.grad = dense.weight.grad.flatten()[keys].clone()
    return conversion


@dataclass
class _NonZeros:
    """The rule behind `sparsify_`."""

    below: float
    made: list[tuple[Any, SparseLayer]] = field(default_factory=list)

    def takes(self, module: nn.Module) -> bool:
        return type(module) in (nn.Linear, nn.Conv2d) and _density(module) < self.below

    def __call__(self, module: Any) -> nn.Module | None:
        if type(module) not in (nn.Linear, nn.Conv2d):
            return None
        if not self.takes(module):
            raise Leave(f"{_density(module):.1%} of its weights are not zero, which is not below {self.below:.1%}")
        parts_of(module)  # raises Leave for what cannot be sparse
        if hooked(module):
            raise Leave("it has hooks, which would be lost")
        kind = SparseLinear if type(module) is nn.Linear else SparseConv2d
        sparse = kind.from_dense(module)
        sparse.bias = module.bias
        self.made.append((module, sparse))
        return sparse


def _density(module: nn.Module) -> float:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.count_nonzero()) / max(weight.numel(), 1)
