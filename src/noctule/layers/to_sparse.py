"""The rules that make a model sparse, and dense again."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from noctule.budget import Budget, erdos_renyi
from noctule.convert import Leave, Rule, hooked
from noctule.layers.sparse_linear import SparseLinear
from noctule.measure.timing import interleave
from noctule.pattern import Pattern, anywhere


@dataclass(frozen=True, kw_only=True)
class ToSparse:
    """`nn.Linear` -> `SparseLinear`, a total number of weights shared out over the layers.

    Args:
        density: the share of all the layers' places that is kept, in (0, 1]; give this or ``weights`` or ``epsilon``.
        weights: the number of weights kept, over all layers.
        epsilon: epsilon (O + I) weights for each layer (Mocanu et al. 2018), a full layer's surplus not passed on.
        budget: how the layers share.
        pattern: which places are kept.
        fresh: draw new values, scaled to the sparse fan-in (to train from scratch); else keep those of the dense layer.
        measure_first: leave a layer dense where a dense step is measured to be faster.
        batch: how many samples a measured step has.
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
        """Share the weights out over the linear layers among these modules."""
        layers = [m for m in modules.values() if type(m) is nn.Linear]
        shapes = [(m.out_features, m.in_features) for m in layers]
        if self.epsilon is not None:
            shares = [min(max(1, round(self.epsilon * (o + i))), o * i) for o, i in shapes]
        else:
            total = self.weights
            if self.density is not None:
                places = [o * i for o, i in shapes]
                total = max(sum(p > 0 for p in places), round(self.density * sum(places)))
            shares = self.budget(shapes, total or 0) if layers else []
        weights = dict(zip(layers, shares, strict=True))

        def rule(module: nn.Module) -> nn.Module | None:
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                raise Leave(f"{type(module).__name__} is not a plain nn.Linear")
            if type(module) is not nn.Linear:
                return None
            if module not in weights:
                raise Leave("it holds tied weights")
            return self._sparse(module, weights[module])

        return rule

    def _sparse(self, linear: nn.Linear, weights: int) -> nn.Module:
        if hooked(linear):
            raise Leave("it has hooks, which would be lost")
        layer = SparseLinear.from_dense(linear, topology=self.pattern(linear, weights, self.generator))
        if self.fresh:
            layer.reset_parameters(generator=self.generator)
        if self.measure_first:
            seconds = {name: t.median_seconds for name, t in _step_times(linear, layer, self.batch).items()}
            if seconds["dense"] <= seconds["sparse"]:
                raise Leave(
                    f"dense is faster: {seconds['dense'] * 1e3:.3f} ms against {seconds['sparse'] * 1e3:.3f} ms "
                    f"at {layer.density:.1%} of the weights and batch {self.batch}"
                )
        return layer


@dataclass(frozen=True)
class ToDense:
    """`SparseLinear` -> `nn.Linear` with the zeros written out, followed by its activation and dropout if it had them fused."""

    def __call__(self, module: nn.Module) -> nn.Module | None:
        """The dense twin, or None for another kind of module."""
        if not isinstance(module, SparseLinear):
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


def _step_times(dense: nn.Linear, sparse: SparseLinear, batch: int):
    """Forward and the gradients of each, in turn."""
    x = torch.randn(batch, dense.in_features).to(dense.weight).requires_grad_()

    def step(layer: nn.Module):
        y = layer(x)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), wanted, torch.ones_like(y))

    return interleave({"dense": step(dense), "sparse": step(sparse)}, rounds=7, warmup=2)
