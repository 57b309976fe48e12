"""Bits for each layer: as few as a budget of bytes asks for, where they harm least."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from noctule.compress.budget import least_harm
from noctule.compress.quantize.layers import KINDS, check_evaluation, weight_of
from noctule.compress.quantize.numbers import dequantize_weight, quantize_weight

Sensitivity = Mapping[str, Mapping[int, float]]
"""Name of a layer -> bits -> harm to the model if only this layer has that few."""


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
    check_evaluation(model.modules())
    pairs: list[tuple[Any, Any]] = [(b[0], b[1]) if isinstance(b, tuple | list) else (b, None) for b in batches]
    if not pairs:
        raise ValueError("there is no batch to measure with: give some hundred samples of the training data")
    if loss is not None and any(target is None for _, target in pairs):
        raise ValueError("a loss needs batches of (inputs, targets)")
    if loss is None:
        pairs = [(x, model(x)) for x, _ in pairs]
    measure = loss or _error_share

    def mean_loss() -> float:
        return sum(float(measure(model(x), target)) for x, target in pairs) / len(pairs)

    def harm(weight: Tensor, topology: Any, few: int) -> float:
        kept = weight.clone()
        try:
            weight.copy_(dequantize_weight(*quantize_weight(kept, few, topology), topology))
            return max(mean_loss() - before, 0.0)
        finally:
            weight.copy_(kept)

    before = mean_loss()
    layers = {name: weight_of(module) for name, module in model.named_modules() if type(module) in KINDS}
    return {name: {few: harm(*layer, few) for few in bits} for name, layer in layers.items()}


def _error_share(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).double().square().sum() / target.double().square().sum().clamp(min=1e-30)


def weight_bytes(module: nn.Module, bits: int) -> int:
    """What the weight of a layer takes with that many bits (32: as it is), scales included, places of sparse weights not."""
    weight, topology = weight_of(module)
    if bits == 32:
        return weight.nbytes
    rows = topology.shape[0] if topology is not None else weight.shape[0]
    return -(-weight.numel() * bits // 8) + 4 * rows


def choose_bits(model: nn.Module, harms: Sensitivity, budget_bytes: int) -> dict[str, int]:
    """The bits of each layer whose weights fit the budget together with the least sum of harms.

    A layer that is better left as it is is not in the mapping, which `WeightOnly` and `FakeQuantize` take. The budget is told apart
    in 4,096 parts.

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
    choices = [sorted({32: 0.0, **harm}.items(), reverse=True) for harm in harms.values()]
    sizes = [[(weight_bytes(modules[n], bits), h) for bits, h in own] for n, own in zip(harms, choices, strict=True)]
    taken = zip(harms, choices, least_harm(sizes, budget_bytes), strict=True)
    return {name: own[k][0] for name, own, k in taken if own[k][0] != 32}
