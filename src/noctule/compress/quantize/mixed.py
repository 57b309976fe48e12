"""Bits for each layer: as few as a budget of bytes asks for, where they harm least."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from noctule.compress.quantize.numbers import dequantize_weight, quantize_weight
from noctule.compress.quantize.operation import KINDS, weight_of

Sensitivity = Mapping[str, Mapping[int, float]]
"""Name of a layer -> bits -> harm to the model if only this layer has that few."""

UNITS = 4096
"""Parts of the budget that are told apart; a layer's bytes count as whole parts, rounded up."""


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bits: Sequence[int] = (8, 4, 1),
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, dict[int, float]]:
    """Quantise one layer's weight at a time and measure the harm to the model; every weight is as before in the end.

    Args:
        model: in evaluation mode.
        batches: inputs, or (inputs, targets), held in memory.
        bits: numbers of bits to try.
        loss: of outputs and targets: the harm is what it grows by, at least 0. Without it the harm is the squared error of the
            outputs as a share of their squares.

    Raises:
        ValueError: the model is in training mode, there is no batch, or a loss without targets.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, where outputs are others: call model.eval() first")
    pairs: list[tuple[Any, Any]] = [(b[0], b[1]) if isinstance(b, tuple | list) else (b, None) for b in batches]
    if not pairs:
        raise ValueError("there is no batch to measure with: give some hundred samples of the training data")
    if loss is not None and any(target is None for _, target in pairs):
        raise ValueError("a loss needs batches of (inputs, targets)")
    before = [model(x) for x, _ in pairs]

    def harm() -> float:
        now = [model(x) for x, _ in pairs]
        if loss is None:
            error = sum(float((a - b).double().square().sum()) for a, b in zip(now, before, strict=True))
            return error / max(sum(float(b.double().square().sum()) for b in before), 1e-30)
        grown = [float(loss(a, t)) - float(loss(b, t)) for a, b, (_, t) in zip(now, before, pairs, strict=True)]
        return max(sum(grown) / len(grown), 0.0)

    result: dict[str, dict[int, float]] = {}
    for name, module in model.named_modules():
        if type(module) in KINDS:
            weight, topology = weight_of(module)
            kept = weight.detach().clone()
            try:
                for each in bits:
                    weight.copy_(dequantize_weight(*quantize_weight(kept, each, topology), topology))
                    result.setdefault(name, {})[each] = harm()
            finally:
                weight.copy_(kept)
    return result


def weight_bytes(module: nn.Module, bits: int) -> int:
    """What the weight of a layer takes with that many bits (32: as it is), scales included, places of sparse weights not."""
    weight, topology = weight_of(module)
    if bits == 32:
        return weight.nbytes
    rows = topology.shape[0] if topology is not None else weight.shape[0]
    return -(-weight.numel() * bits // 8) + 4 * rows


def choose_bits(model: nn.Module, harms: Sensitivity, budget_bytes: int) -> dict[str, int]:
    """The bits of each layer whose weights fit the budget together with the least sum of harms.

    It is a knapsack, solved by dynamic programming over 4,096 parts of the budget; of equal sums the one with more bits in the
    first layers. A layer that is better left as it is is not in the mapping, which `WeightOnly` and `FakeQuantize` take.

    Args:
        model: whose layers ``harms`` names.
        harms: from `sensitivity`.
        budget_bytes: for the weights of these layers, their scales included.

    Raises:
        ValueError: ``harms`` is of another model, or the fewest bits do not fit.
    """
    modules = dict(model.named_modules())
    if lost := [name for name in harms if type(modules.get(name)) not in KINDS]:
        raise ValueError(f"these harms are of another model: no layer {', '.join(lost[:8])} here")
    unit = max(1, budget_bytes // UNITS)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for name, harm in harms.items():
        choices = [
            (-(-weight_bytes(modules[name], b) // unit), h, b)
            for b, h in sorted({32: 0.0, **harm}.items(), reverse=True)
        ]
        wider: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (total, chosen) in best.items():
            for units, h, b in choices:
                at = used + units
                if at * unit <= budget_bytes and (at not in wider or total + h < wider[at][0]):
                    wider[at] = total + h, (*chosen, b)
        best = wider
    if not best:
        least = sum(min(weight_bytes(modules[name], b) for b in harm) for name, harm in harms.items())
        raise ValueError(
            f"{budget_bytes:,} bytes do not hold these layers: the fewest bits take {least:,} (and rounding)"
        )
    _, chosen = min(best.values(), key=lambda entry: (entry[0], [-b for b in entry[1]]))
    return {name: b for name, b in zip(harms, chosen, strict=True) if b != 32}
