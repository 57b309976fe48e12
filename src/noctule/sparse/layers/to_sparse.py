"""The rules that make a model sparse, and dense again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from noctule.core.convert import Leave, Rule, hooked
from noctule.measure.timing import interleave
from noctule.sparse.budget import Budget, check_density, check_said_once, erdos_renyi
from noctule.sparse.layers.attention import SparseAttention, projections_of
from noctule.sparse.layers.dense_twin import twin_of
from noctule.sparse.layers.experts import SparseExperts, expert_layers, is_experts
from noctule.sparse.layers.foreign import is_conv1d, linear_of, note_for_hugging_face
from noctule.sparse.layers.sparse_conv1d import SparseConv1d, conv2d_of
from noctule.sparse.layers.sparse_conv2d import SparseConv2d
from noctule.sparse.layers.sparse_layer import SparseLayer
from noctule.sparse.layers.sparse_linear import SparseLinear
from noctule.sparse.layers.staying import adapted, obstacle, quantised, why_dense
from noctule.sparse.pattern import Pattern, anywhere

TWINS: dict[type[nn.Module], type[SparseLayer]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
"""Dense layer -> its sparse kind."""

PLAIN: tuple[type[nn.Module], ...] = (*TWINS, nn.MultiheadAttention, nn.Conv1d)
"""What becomes sparse where it is of just this class."""


@dataclass(frozen=True, kw_only=True)
class ToSparse:
    """`nn.Linear` -> `SparseLinear`, `nn.Conv2d` -> `SparseConv2d`, a total number of weights shared out over the layers.

    `nn.MultiheadAttention` becomes a `SparseAttention` of four layers, `nn.Conv1d` a `SparseConv1d`, Hugging Face's fused experts a
    `SparseExperts` with two layers for each, its `Conv1D` a `SparseLinear`. Where a part of an `nn.TransformerEncoderLayer` is
    sparse, torch no longer takes its fused path of evaluation, which reads dense weights. What else is large is left and named.

    Args:
        density: the share of all the layers' places that is kept, in (0, 1]; give this or ``weights`` or ``epsilon``.
        weights: the number of weights kept, over all layers.
        epsilon: epsilon (O + I) weights for each layer (Mocanu et al. 2018), a full layer's surplus not passed on.
        budget: how the layers share.
        pattern: which places are kept.
        fresh: draw new values, scaled to the sparse fan-in (to train from scratch); else keep those of the dense layer.
        measure_first: leave a layer dense where a dense step is measured to be faster.
        batch: how many samples a measured step has.
        image_size: height and width of what a measured convolution sees.
        generator: where random places and values come from.
    """

    density: float | None = None
    weights: int | None = None
    epsilon: float | None = None
    budget: Budget = erdos_renyi
    pattern: Pattern = anywhere
    fresh: bool = True
    measure_first: bool = False
    batch: int = 128
    image_size: tuple[int, int] = (28, 28)
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_said_once(density=self.density, weights=self.weights, epsilon=self.epsilon)
        if self.density is not None:
            check_density(self.density)
        if self.epsilon is not None and self.epsilon <= 0.0:
            raise ValueError(f"epsilon must be above 0, got {self.epsilon}")

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """Share the weights out over what can become sparse among these modules."""
        parts: dict[nn.Module, list[nn.Module]] = {}
        reasons: dict[nn.Module, Leave] = {}
        within = {m.out_proj for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
        wrapped = {inner: why for m in modules.values() if (why := adapted(m)) for inner in m.modules()}
        for module in modules.values():
            if module not in within:
                try:
                    parts[module] = parts_of(module)
                    if parts[module] and module in wrapped:
                        raise Leave(wrapped[module])
                except Leave as reason:
                    reasons[module] = reason
        weights = self._shares([part for own in parts.values() for part in own])

        def rule(module: nn.Module) -> nn.Module | None:
            if module in within:  # it goes or stays with its attention
                return None
            if module in reasons:
                raise reasons[module]
            if own := parts.get(module):
                return self._sparse(module, own, [weights[part] for part in own])
            if module not in parts and parts_of(module):
                raise Leave("it holds tied weights")
            if isinstance(module, nn.TransformerEncoderLayer) and any(
                isinstance(m, SparseLayer) for m in module.modules()
            ):
                raise Leave(
                    "its parts are sparse; torch's fused path of evaluation, which reads dense weights, stays off"
                )
            return None

        return rule

    def why_dense(self, module: nn.Module) -> str | None:
        """Why parameters that a module holds itself stay dense, where that is worth a word."""
        return why_dense(module)

    def finish(self, model: nn.Module) -> None:
        """Have the config of a Hugging Face model name its sparse layers."""
        note_for_hugging_face(model)

    def _shares(self, layers: Sequence[nn.Module]) -> dict[nn.Module, int]:
        shapes = [tuple(m.weight.shape) for m in layers]  # type: ignore[union-attr]
        places = [prod(shape) for shape in shapes]
        if self.epsilon is not None:
            shares = [min(max(1, round(self.epsilon * sum(s))), p) for s, p in zip(shapes, places, strict=True)]
        else:
            total = self.weights
            if self.density is not None:
                total = max(sum(p > 0 for p in places), round(self.density * sum(places)))
            shares = self.budget(shapes, total or 0) if layers else []
        return dict(zip(layers, shares, strict=True))

    def _sparse(self, module: nn.Module, parts: Sequence[nn.Module], weights: Sequence[int]) -> nn.Module:
        layers = [self._twin(part, share) for part, share in zip(parts, weights, strict=True)]
        if self.measure_first:
            self._check_faster(parts, layers)
        if isinstance(module, nn.MultiheadAttention):
            return SparseAttention.from_dense(module, layers)
        if isinstance(module, nn.Conv1d):
            return SparseConv1d.from_dense(module, layers[0])
        if is_experts(module):
            return SparseExperts.from_dense(module, layers)
        if parts[0] is not module:
            layers[0].origin = type(module)
        return layers[0]

    def _twin(self, dense: nn.Module, weights: int) -> Any:
        layer = TWINS[type(dense)].from_dense(dense, topology=self.pattern(dense, weights, self.generator))
        if self.fresh:
            layer.reset_parameters(generator=self.generator)
        return layer

    def _check_faster(self, parts: Sequence[nn.Module], layers: Sequence[SparseLayer]) -> None:
        pairs = {
            p.weight.shape: (p, layer) for p, layer in zip(parts, layers, strict=True)
        }.values()  # one of each shape
        times = [_step_times(dense, sparse, self._sample(dense)) for dense, sparse in pairs]
        seconds = {name: sum(own[name].median_seconds for own in times) for name in ("dense", "sparse")}
        if seconds["dense"] <= seconds["sparse"]:
            density = sum(layer.weights for layer in layers) / sum(layer.topology.places for layer in layers)
            raise Leave(
                f"dense is faster: {seconds['dense'] * 1e3:.3f} ms against {seconds['sparse'] * 1e3:.3f} ms "
                f"at {density:.1%} of the weights and batch {self.batch}"
            )

    def _sample(self, dense: nn.Module) -> Tensor:
        if isinstance(dense, nn.Conv2d):
            line = isinstance(dense.kernel_size, tuple) and dense.kernel_size[0] == 1 != dense.kernel_size[1]
            size = (1, self.image_size[1]) if line else self.image_size
            return torch.randn(self.batch, dense.in_channels, *size)
        assert isinstance(dense, nn.Linear)
        return torch.randn(self.batch, dense.in_features)


@dataclass(frozen=True)
class ToDense:
    """Sparse layers -> what they were made from, zeros written out, followed by activation and dropout if these were fused."""

    def __call__(self, module: nn.Module) -> nn.Module | None:
        """The dense twin, or None for another kind of module."""
        if not isinstance(module, SparseLayer | SparseAttention | SparseExperts | SparseConv1d):
            return None
        if any(hooked(m) for m in module.modules()):
            raise Leave("it has hooks, which would be lost")
        return twin_of(module) if isinstance(module, SparseLayer) else module.to_dense()

    def finish(self, model: nn.Module) -> None:
        """Have the config of a Hugging Face model name the layers that are sparse still."""
        note_for_hugging_face(model)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The plain linear layers and convolutions of images that a module consists of; none where it is of another kind.

    Raises:
        Leave: it is of a kind that becomes sparse, and cannot; the text says why.
    """
    kind = next((k for k in PLAIN if isinstance(module, k)), None)
    if reason := quantised(module):
        raise Leave(reason)
    if kind is None and not is_conv1d(module) and not is_experts(module):
        return []
    if type(module) is NonDynamicallyQuantizableLinear:
        raise Leave("nn.MultiheadAttention reads its weight itself")
    if reason := next(filter(None, map(obstacle, module.modules())), None):
        raise Leave(reason)
    if kind is not None and type(module) is not kind:
        raise Leave(f"{type(module).__name__} is not a plain nn.{kind.__name__}")
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode != "zeros":
        raise Leave(f"it pads with {module.padding_mode!r}, not with zeros")
    if isinstance(module, nn.MultiheadAttention):
        return [*projections_of(module)]
    if isinstance(module, nn.Conv1d):
        if module.groups == module.in_channels > 1:
            raise Leave("each of its channels has a kernel of its own, too small to be sparse")
        return [conv2d_of(module)]
    if kind is None:
        return [*expert_layers(module)] if is_experts(module) else [linear_of(module)]
    return [module]


def _step_times(dense: nn.Module, sparse: SparseLayer, sample: Tensor):
    """Forward and the gradients of each, in turn."""
    x = sample.to(sparse.values).requires_grad_()

    def step(layer: nn.Module):
        y = layer(x)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), wanted, torch.ones_like(y))

    functions = {"dense": step(dense), "sparse": step(sparse)}
    once = sum(own.minimum for own in interleave(functions, rounds=1, warmup=2).values())
    # what takes microseconds is at the mercy of whatever else runs for the length of seven rounds
    return interleave(functions, rounds=min(max(7, int(0.2 / once)), 201), warmup=0)
