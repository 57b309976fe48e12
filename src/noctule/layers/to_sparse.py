"""The rules that make a model sparse, and dense again."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from noctule.budget import Budget, erdos_renyi
from noctule.convert import Leave, Rule, hooked
from noctule.layers.sparse_conv2d import SparseConv2d
from noctule.layers.sparse_layer import SparseLayer
from noctule.layers.sparse_linear import SparseLinear
from noctule.measure.timing import interleave
from noctule.pattern import Pattern, anywhere

TWINS: dict[type[nn.Module], type[SparseLayer]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
"""Dense layer -> its sparse kind."""


@dataclass(frozen=True, kw_only=True)
class ToSparse:
    """`nn.Linear` -> `SparseLinear`, `nn.Conv2d` -> `SparseConv2d`, a total number of weights shared out over the layers.

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
        """Refuses a rule that does not say how sparse, or says it twice."""
        if sum(given is not None for given in (self.density, self.weights, self.epsilon)) != 1:
            raise ValueError("say how sparse the model becomes: one of density=, weights= or epsilon=")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if self.epsilon is not None and self.epsilon <= 0.0:
            raise ValueError(f"epsilon must be above 0, got {self.epsilon}")

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """Share the weights out over the linear layers and convolutions among these modules."""
        layers = [m for m in modules.values() if type(m) in TWINS]
        shapes = [tuple(m.weight.shape) for m in layers]  # type: ignore[union-attr]
        places = [prod(shape) for shape in shapes]
        if self.epsilon is not None:
            shares = [min(max(1, round(self.epsilon * sum(s))), p) for s, p in zip(shapes, places, strict=True)]
        else:
            total = self.weights
            if self.density is not None:
                total = max(sum(p > 0 for p in places), round(self.density * sum(places)))
            shares = self.budget(shapes, total or 0) if layers else []
        weights = dict(zip(layers, shares, strict=True))

        def rule(module: nn.Module) -> nn.Module | None:
            kind = next((kind for kind in TWINS if isinstance(module, kind)), None)
            if kind is None:
                return None
            if type(module) is not kind:
                raise Leave(f"{type(module).__name__} is not a plain nn.{kind.__name__}")
            if module not in weights:
                raise Leave("it holds tied weights")
            return self._sparse(module, weights[module])

        return rule

    def _sparse(self, dense: nn.Module, weights: int) -> nn.Module:
        if hooked(dense):
            raise Leave("it has hooks, which would be lost")
        if isinstance(dense, nn.Conv2d) and dense.padding_mode != "zeros":
            raise Leave(f"it pads with {dense.padding_mode!r}, not with zeros")
        topology = self.pattern(dense, weights, self.generator)
        layer = TWINS[type(dense)].from_dense(dense, topology=topology)
        if self.fresh:
            layer.reset_parameters(generator=self.generator)
        if self.measure_first:
            seconds = {name: t.median_seconds for name, t in _step_times(dense, layer, self._sample(dense)).items()}
            if seconds["dense"] <= seconds["sparse"]:
                raise Leave(
                    f"dense is faster: {seconds['dense'] * 1e3:.3f} ms against {seconds['sparse'] * 1e3:.3f} ms "
                    f"at {layer.density:.1%} of the weights and batch {self.batch}"
                )
        return layer

    def _sample(self, dense: nn.Module) -> Tensor:
        if isinstance(dense, nn.Conv2d):
            return torch.randn(self.batch, dense.in_channels, *self.image_size)
        assert isinstance(dense, nn.Linear)
        return torch.randn(self.batch, dense.in_features)


@dataclass(frozen=True)
class ToDense:
    """Sparse layers -> dense ones with the zeros written out, followed by the activation and dropout they had fused."""

    def __call__(self, module: nn.Module) -> nn.Module | None:
        """The dense twin, or None for another kind of module."""
        if not isinstance(module, SparseLayer):
            return None
        if hooked(module):
            raise Leave("it has hooks, which would be lost")
        slope, dropout = module.epilogue.slope, module.epilogue.dropout
        after: list[nn.Module] = []
        if slope != 1.0:
            after.append(nn.ReLU() if slope == 0.0 else nn.LeakyReLU(slope))
        if dropout:
            after.append(nn.Dropout(dropout))
        return nn.Sequential(module.to_dense(), *after) if after else module.to_dense()


def _step_times(dense: nn.Module, sparse: SparseLayer, sample: Tensor):
    """Forward and the gradients of each, in turn."""
    x = sample.to(sparse.values).requires_grad_()

    def step(layer: nn.Module):
        y = layer(x)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), wanted, torch.ones_like(y))

    return interleave({"dense": step(dense), "sparse": step(sparse)}, rounds=7, warmup=2)
