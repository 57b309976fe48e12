"""How large the error of a saved activation may be: COMET's bound from the momentum and the gradient of the outputs.

Jin et al. 2022 (COMET, VLDB; arXiv 2111.09562): an error uniform in [-eb, eb] of a layer's input moves the gradient of the weights
of output channel c by a normal error of standard deviation eb sqrt(R / 3) ||g_c||, with g_c the loss's gradient at that channel and
R the share of the input that is not zero. It may be a fraction k of the root mean square of the channel's momentum: eb = k
rms(m_c) sqrt(3 / R) / ||g_c||, here the median over channels. Differs from the paper: batch norms have a bound too (that of their
weight; since a channel has one momentum, the root mean square is that of all channels); with a fused activation the gradient is
taken behind it, where it is no smaller; and codes have a fixed width, for which a larger k than the paper's 0.01 is needed to save
as much. The authors' code has a fixed bound.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.method import Method
from noctule.core.remap import Remap
from noctule.sparse.layers import SparseLayer, SparseLinear

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, SparseLayer, *_NORMS)


class AdaptiveBound(Method):
    """Bounds for the inputs of linear layers, convolutions and batch norms: attach it, and name it in `compress_saved`.

    Bounds are found in the second step, again after twice as many steps, and so on up to every ``every`` steps. Saved tensors
    are told apart by their order in the forward pass, their producer and their shape; one that does not fit takes the bits of the
    block.

    Args:
        k: the error that a gradient may have, as a fraction of its momentum.
        every: steps from one refresh to the next.

    Raises:
        ValueError: ``k`` or ``every`` is out of range; at `attach`: no layer has an optimizer that keeps a momentum.
    """

    def __init__(self, *, k: float = 0.02, every: int = 100) -> None:
        if not k > 0.0 or every < 1:
            raise ValueError(f"k must be above 0 and every at least 1, got {k} and {every}")
        self.k, self.every, self.steps = k, every, 0
        self.bounds: dict[str, float] = {}
        """The largest error of the inputs of each layer, by name."""
        self._due, self._slot = 1, 0
        self._plan: list[tuple[list[int], str, float]] = []
        self._layers: dict[nn.Module, str] = {}
        self._optimizers: tuple[Optimizer, ...] = ()
        self._pass: _Pass | None = None

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        moving = {
            id(p)
            for o in optimizers
            for group in o.param_groups
            for p in group["params"]
            if group.get("momentum") or "betas" in group
        }
        layers: dict[nn.Module, str] = {
            m: name for name, m in model.named_modules() if isinstance(m, _LAYERS) and id(_weight(m)) in moving
        }
        if not layers:
            raise ValueError(
                "AdaptiveBound needs the momentum of linear layers, convolutions or batch norms, and no attached optimizer keeps "
                "one: use SGD(momentum=0.9), Adam or the like, or compress_saved(bits=8) without adaptive="
            )
        self._layers, self._optimizers = layers, tuple(optimizers)

    @override
    def after_step(self) -> None:
        self.steps += 1
        seen, self._pass = self._pass, None
        if seen is None or not seen.complete:
            return
        limits = [self._limit(call) for call in seen.calls]
        self.bounds = {}
        for call, limit in zip(seen.calls, limits, strict=True):
            name = self._layers[call.layer]
            self.bounds[name] = min(limit, self.bounds.get(name, limit))
        self._plan = seen.plan(limits)
        self._due = self.steps + min(self.steps, self.every)

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """What was found belongs to other widths: until it is found anew, the bits of the block hold."""
        self._plan, self._pass, self._due = [], None, self.steps

    @override
    def end(self) -> None:
        self._layers, self._optimizers, self._pass = {}, (), None

    @override
    def state_dict(self) -> dict[str, Any]:
        plan = [{"shape": shape, "producer": producer, "step": step} for shape, producer, step in self._plan]
        return {"steps": self.steps, "due": self._due, "bounds": dict(self.bounds), "plan": plan}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self._due, self.bounds = int(state["steps"]), int(state["due"]), dict(state["bounds"])
        self._plan = [(list(map(int, s["shape"])), s["producer"], float(s["step"])) for s in state["plan"]]

    # Called by compress_saved.

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The block of one forward pass; watches it where the bounds are due."""
        if not self._layers:
            raise ValueError("the bounds are not attached: with attach(model, optimizer, bounds): ...")
        self._slot = 0
        with ExitStack() as stack:
            if self.steps >= self._due and self._pass is None and torch.is_grad_enabled():
                self._pass = _Pass()
                for layer in self._layers:
                    stack.callback(layer.register_forward_hook(self._pass.called).remove)
            yield
            if self._pass is not None:
                self._pass.open = False

    def step_of(self, x: Tensor) -> float | None:
        """The step of the grid for the next saved tensor, or None where there is no bound."""
        at, self._slot = self._slot, self._slot + 1
        shape, producer = list(x.shape[1:]), _producer(x)
        if self._pass is not None and self._pass.open:
            self._pass.slots.append((StorageWeakRef(x.untyped_storage()), shape, producer))
        if at < len(self._plan) and self._plan[at][:2] == (shape, producer):
            return self._plan[at][2] or None
        return None

    def recomputed(self, x: Tensor, source: int, slope: float) -> None:
        """Note that ``x`` is computed again from a packed storage, whose error it takes ``slope`` times."""
        if self._pass is not None and self._pass.open:
            self._pass.sources[StorageWeakRef(x.untyped_storage())] = (source, slope)

    def _limit(self, call: "_Call") -> float:
        """The bound of the input of one call of a layer; inf where the gradient is zero."""
        weight = _weight(call.layer)
        state = next((o.state[weight] for o in self._optimizers if weight in o.state), {})
        momentum = state.get("momentum_buffer", state.get("exp_avg"))
        if momentum is None or call.norm_C is None:
            return 0.0
        rms_C = _rms(call.layer, momentum)
        norm_C = call.norm_C
        if isinstance(call.layer, _NORMS) and call.layer.running_var is not None:
            norm_C = norm_C * (call.layer.running_var + call.layer.eps).rsqrt()
        limit_C = self.k * rms_C * (3.0 / max(call.filled, 1e-3)) ** 0.5 / norm_C.clamp(min=1e-30)
        limit = float(limit_C.median())
        return limit if limit == limit else 0.0


def _weight(layer: Any) -> Tensor:
    return layer.values if isinstance(layer, SparseLayer) else layer.weight


def _rms(layer: Any, momentum: Tensor) -> Tensor:
    """The root mean square of the momentum of each output channel (C,); of a norm one number for all."""
    if isinstance(layer, SparseLayer):
        rows, count = layer.topology.rows(), layer.topology.shape[0]
        squares_C = momentum.new_zeros(count).index_add_(0, rows, momentum.square())
        return (squares_C / torch.bincount(rows, minlength=count).clamp(min=1)).sqrt()
    return momentum.square().flatten(min(1, momentum.dim() - 1)).mean(-1).sqrt()


class _Call:
    """One call of a layer in a pass that is watched."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.layer, self.storage = layer, StorageWeakRef(x.untyped_storage())
        self.filled = float((x != 0).float().mean())
        self.norm_C: Tensor | None = None

    def see(self, gradient: Tensor) -> None:
        """The norm of each channel of the output's gradient."""
        channel = -1 if isinstance(self.layer, nn.Linear | SparseLinear) else 1
        self.norm_C = gradient.float().movedim(channel, 0).flatten(1).norm(dim=1)


class _Pass:
    """A forward pass that is watched: the calls of the layers, and the saved tensors in their order."""

    def __init__(self) -> None:
        self.open = True
        self.calls: list[_Call] = []
        self.slots: list[tuple[StorageWeakRef, list[int], str]] = []
        self.sources: dict[StorageWeakRef, tuple[int, float]] = {}

    @property
    def complete(self) -> bool:
        """Whether the backward pass came, too."""
        return bool(self.calls) and all(call.norm_C is not None for call in self.calls)

    def called(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note a call of a layer, as a forward hook."""
        if self.open and torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad and inputs:
            call = _Call(layer, inputs[0].detach())
            output.register_hook(call.see)
            self.calls.append(call)

    def plan(self, limits: Sequence[float]) -> list[tuple[list[int], str, float]]:
        """The step of each saved tensor: twice the smallest bound of the layers that read it, 0 where none does."""
        steps: dict[int, float] = {}
        sources = {storage.cdata: found for storage, found in self.sources.items()}
        for call, limit in zip(self.calls, limits, strict=True):
            storage, slope = sources.get(call.storage.cdata, (call.storage.cdata, 1.0))
            step = 2.0 * limit / max(slope, 1e-30)
            steps[storage] = min(step, steps.get(storage, step))
        return [(shape, producer, steps.get(storage.cdata, 0.0)) for storage, shape, producer in self.slots]


def _producer(x: Tensor) -> str:
    return "" if x.grad_fn is None else x.grad_fn.name()
