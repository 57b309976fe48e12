"""Torch's optimizers as sparse training needs them: groups, state that follows a `Remap`, and the quirks of a step."""

import math
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from noctule.core.remap import Remap

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_SIGNED = frozenset(
    {"momentum_buffer", "exp_avg", "grad_avg", "prev", "ax", "z", "state1", "old_p", "e_w", "slow_params", "slow_param"}
)
"""State of either sign in torch's optimizers and well-known others; a small layer's can be non-negative by accident."""


def sparse_layers(model: nn.Module) -> dict[str, Any]:
    """The sparse layers of a model by name: modules with a `topology` and a parameter `values` of their own."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "topology") and "values" in dict(module.named_parameters(recurse=False))
    }


def param_groups(model: nn.Module, *, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Two parameter groups: with weight decay (matrices, kernels, sparse `values`), without (biases, norms, vectors).

    `weight_decay` is that of the first group; None leaves it to the optimizer. Frozen parameters are left out, tied
    ones appear once.

    >>> groups = param_groups(nn.Linear(3, 2))
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    [(0.1, 1), (0.0, 1)]
    """
    if weight_decay is not None and not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay}")
    values = {id(layer.values) for layer in sparse_layers(model).values()}
    decays: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and "bias" not in name and not isinstance(module, _NORMS)
                decays[parameter] = matrix or id(parameter) in values
    if not decays:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: nothing to give an optimizer")
    with_decay: dict[str, Any] = {"params": [parameter for parameter, decay in decays.items() if decay]}
    if weight_decay is not None:
        with_decay["weight_decay"] = weight_decay
    return [
        with_decay,
        {"params": [parameter for parameter, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]


def unwrapped(optimizer: Any) -> list[Optimizer]:
    """An optimizer and the optimizers inside it, as Lookahead, SAM, ZeroRedundancyOptimizer or accelerate's hold them."""
    found: list[Optimizer] = []
    seen: set[int] = set()

    def look(thing: Any, depth: int) -> None:
        if id(thing) in seen or isinstance(thing, Tensor | nn.Module | type):
            return
        seen.add(id(thing))
        if isinstance(thing, Optimizer):
            found.append(thing)
            depth = 0
        if not depth:
            inside = [x for key, x in getattr(thing, "__dict__", {}).items() if key not in ("state", "param_groups")]
        elif depth < _DEPTH and isinstance(thing, dict | list | tuple):
            inside = list(thing.values()) if isinstance(thing, dict) else list(thing)
        else:
            return
        for value in inside:
            look(value, depth + 1)

    look(optimizer, 0)
    return found


_DEPTH = 3
"""How deep in lists and dicts of an optimizer another one is looked for."""


def check_carry(optimizers: Optimizer | Iterable[Optimizer], parameter: Tensor) -> None:
    """Raise ValueError, saying why and what to do, if an optimizer's state for `parameter` cannot follow a `Remap`."""
    for optimizer in _several(optimizers):
        if not _knows(optimizer, parameter):
            continue
        name = type(optimizer).__name__
        for key, value in vars(optimizer).items():
            if key not in ("state", "param_groups", "defaults") and _holds(value, parameter):
                raise ValueError(
                    f"{name} keeps numbers for these {parameter.numel()} weights in its attribute {key!r}, outside of its state, "
                    "where they cannot follow a change of places: use one that keeps them in optimizer.state, or use a Method "
                    "that follows, such as ExponentialAverage or DiLoCo (whose anchor is Lookahead's slow weights)"
                )
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{name} keeps a history over all weights together, which cannot follow a change of places: "
                "keep the topology fixed, or use an element-wise optimizer such as SGD or AdamW"
            )
        for key, value in optimizer.state.get(parameter, {}).items():
            reason = _obstacle(value, parameter)
            if reason:
                raise ValueError(
                    f"{name} keeps {key!r} for these weights, {reason}: it cannot follow a change of places. "
                    "Use an optimizer with one number of state per weight, such as SGD or AdamW, load the model of a "
                    "checkpoint before its optimizer, or delete optimizer.state[values] before the change to start afresh"
                )


@torch.no_grad()
def carry_state(optimizers: Optimizer | Iterable[Optimizer], old: Tensor, new: Tensor, remap: Remap) -> None:
    """Move what optimizers keep for the weights `old` (N_old in all) to the places of `new` (N_new in all).

    A surviving weight keeps its state. A new one gets the neutral value: 0 for momenta and other state of either sign;
    for non-negative state (second moments and the like), whose zero would mean a huge step, the mean over the layer's
    survivors; state unknown here goes by its signs. Counters (0-d, one-element, or named `step`) stay as they are.

    With the shape unchanged, state tensors are changed in place. Where `new` is another tensor than `old`, it takes its place
    in the groups and in the state.

    Raises:
        ValueError: as `check_carry`, or the sizes do not match; nothing was changed in any of the optimizers.
    """
    optimizers = _several(optimizers)
    check_carry(optimizers, old)
    if old.numel() != remap.old_size or new.numel() != remap.new_size:
        raise ValueError(
            f"the remap leads from {remap.old_size} weights to {remap.new_size}, "
            f"but the old values have shape {tuple(old.shape)} and the new ones {tuple(new.shape)}"
        )
    moved: set[int] = set()  # a wrapper may show the state of the optimizer inside as its own
    for optimizer in optimizers:
        known = old in optimizer.state
        replace_parameter(optimizer, old, new)
        state = optimizer.state[new] if known else {}
        for key, value in state.items():
            if id(value) not in moved and _per_weight(key, value, old):
                state[key] = _moved(key, value, remap, new.shape)
                moved.add(id(state[key]))


def replace_parameter(optimizer: Optimizer, old: Tensor, new: Tensor) -> None:
    """Have an optimizer train another tensor in the place of one, with the state that is there as it is."""
    if old is new:
        return
    for group in optimizer.param_groups:
        group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def will_skip(optimizer: Optimizer) -> bool:
    """Whether the step about to run is one that a GradScaler lets a fused optimizer skip, because of an overflow.

    Raises:
        RuntimeError: the gradients are still scaled.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if getattr(optimizer, "grad_scale", None) is not None:
        if found_inf is not None:  # the scaler set both, and does not take them back when a step raises
            del optimizer.grad_scale, optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        raise RuntimeError(
            f"{type(optimizer).__name__} is fused and would step on gradients that are still scaled, "
            "which methods must not see: call scaler.unscale_(optimizer) before scaler.step(optimizer)"
        )
    return found_inf is not None and bool(found_inf != 0)


class RunningSteps:
    """The steps in progress, by torch's step hooks; a step that raised is noticed, though its post-hook is not called."""

    def __init__(self) -> None:
        self._steps: list[tuple[FrameType, Optimizer]] = []

    def enter(self, optimizer: Optimizer) -> bool:
        """A pre-hook came; False if this step is inside another, such as `super().step()`."""
        self._forget_failed()
        self._steps.append((_frame_of_step(), optimizer))
        return len(self._steps) == 1

    def leave(self) -> Optimizer | None:
        """A post-hook came; the optimizer of the outermost step that goes on, None if this was the outermost."""
        self._forget_failed()
        if self._steps:
            self._steps.pop()
        return self._steps[0][1] if self._steps else None

    def clear(self) -> None:
        """Forget all, and the frames with all they keep alive."""
        self._steps.clear()

    def _forget_failed(self) -> None:
        while self._steps and not _on_stack(self._steps[-1][0]):
            self._steps.pop()


def _frame_of_step() -> FrameType:
    """The frame of torch's wrapper round `step`, out of which the hooks are called."""
    caller = frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != Optimizer.__module__:
        frame = frame.f_back
    return frame or caller


def _on_stack(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


def _several(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def _holds(tree: Any, parameter: Tensor) -> bool:
    """Whether a tensor of an optimizer's attribute has one number for each weight of a parameter, and is not a parameter itself."""
    return any(
        type(leaf) is Tensor
        and leaf.dim() > 0
        and leaf.numel() > 1
        and leaf.shape == parameter.shape
        and not leaf.requires_grad
        for leaf in _leaves(tree)
    )


def _knows(optimizer: Optimizer, parameter: Tensor) -> bool:
    return parameter in optimizer.state or any(p is parameter for g in optimizer.param_groups for p in g["params"])


def _per_weight(key: str, value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and key != "step"


def _obstacle(value: Any, parameter: Tensor) -> str | None:
    """Why a piece of state cannot follow the weights, or None."""
    if isinstance(value, Tensor):
        if value.numel() != 1 and value.shape != parameter.shape:
            return f"of shape {tuple(value.shape)} for {parameter.numel()} weights"
        if value.numel() != 1 and value.dtype in (torch.uint8, torch.int8):
            return f"as {value.dtype}, the codes of quantised numbers"
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            return f"a {type(value).__name__}, not a plain tensor"
    elif isinstance(value, dict | list | tuple | set) and any(isinstance(leaf, Tensor) for leaf in _leaves(value)):
        return f"tensors inside a {type(value).__name__}"
    return None


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple | set):
        yield tree
        return
    for branch in tree:
        yield from _leaves(branch)


def _neutral(key: str, value: Tensor, remap: Remap) -> Tensor:
    """What a new weight's slot of this state (N_old,) starts with, ()."""
    if key in _SIGNED or not value.is_floating_point() or not value.numel() or bool((value < 0).any()):
        return value.new_zeros(())
    survivors = value[remap.old_slot[remap.old_slot >= 0]]
    return (survivors if survivors.numel() else value).mean()


def _moved(key: str, value: Tensor, remap: Remap, shape: torch.Size) -> Tensor:
    flat = value.flatten()
    moved = remap.apply(flat, new=_neutral(key, flat, remap)).view(shape)
    return value.copy_(moved) if shape == value.shape else moved
