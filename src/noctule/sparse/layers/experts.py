"""Experts of a mixture whose weights stand in fused parameters: E sparse layers for each of them.

Shapes: E experts, H features of a token, T tokens, K experts a token.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from noctule.core.convert import Leave
from noctule.sparse.layers.foreign import linear_on, part_of
from noctule.sparse.layers.sparse_linear import SparseLinear

Projection = nn.Linear | SparseLinear


class SparseExperts(nn.Module):
    """Experts with two layers each, which may be sparse: a drop-in for the fused experts of Hugging Face's mixtures.

    There an expert is a slice of ``gate_up_proj`` (or ``up_proj``) and of ``down_proj``, and one declaration on the class says how
    the slices are read: the order of their axes, biases, a gate, a norm at the end. All that is no slice is taken over from there.
    An expert without a token is computed too while gradients are recorded: its gradients are zeros, as those of a slice are.

    Args:
        up: E layers, from H features to what the gate or the activation takes.
        down: E layers, back to H features.
        like: the dense module.
    """

    up: nn.ModuleList
    down: nn.ModuleList

    def __init__(self, up: Sequence[Projection], down: Sequence[Projection], *, like: nn.Module) -> None:
        super().__init__()
        self.origin, self.order = type(like), tuple(like._parameters)
        self.up, self.down = nn.ModuleList(up), nn.ModuleList(down)
        _take_over(self, like, but=_weights_of(like))

    @override
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H) -> (T, H).

        Args:
            hidden_states: the tokens.
            top_k_index: (T, K), the experts of each; one from E on is none.
            top_k_weights: (T, K), what each of them counts.
        """
        experts = top_k_index.flatten().clamp(max=len(self.up))
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=len(self.up) + 1)[: len(self.up)].tolist()
        tokens, weights = order // top_k_index.shape[-1], top_k_weights.flatten()[order]
        parts, start = [], 0
        for up, down, count in zip(self.up, self.down, counts, strict=True):
            rows = slice(start, start + count)
            start += count
            if count or torch.is_grad_enabled():
                y = self._finish(down(self._activate(up(hidden_states[tokens[rows]]))))
                parts.append((y * weights[rows, None]).to(hidden_states.dtype))
        y_TH = torch.zeros_like(hidden_states)
        return y_TH.index_add(0, tokens[:start], torch.cat(parts)) if parts else y_TH

    def _activate(self, x: Tensor) -> Tensor:
        experts: Any = self  # with what was taken over
        return experts.origin._apply_gate(self, x) if experts.has_gate else experts.act_fn(x)

    def _finish(self, x: Tensor) -> Tensor:
        return self.get_submodule("post_expert_norm")(x) if getattr(self, "has_post_expert_norm", False) else x

    @classmethod
    def from_dense(cls, dense: nn.Module, projections: Sequence[Projection]) -> Self:
        """A dense module with these in the place of its slices, in the order of `expert_layers`."""
        half = len(projections) // 2
        return cls(projections[:half], projections[half:], like=dense).train(dense.training)

    def to_dense(self) -> nn.Module:
        """The module of fused experts with the same function, zeros included."""
        dense = self.origin.__new__(self.origin)
        nn.Module.__init__(dense)
        fused: dict[str, nn.Parameter | None] = dict(self._parameters)
        up, down = _names(self)
        layers: Any
        for name, layers in ((up, self.up), (down, self.down)):
            made = [layer.to_dense() if isinstance(layer, SparseLinear) else layer for layer in layers]
            fused[name] = _stacked([m.weight.t() if self.is_transposed else m.weight for m in made])
            if self.has_bias:
                fused[f"{name}_bias"] = _stacked([m.bias for m in made])
        for name in self.order:
            dense.register_parameter(name, fused[name])
        _take_over(dense, self, but={"up", "down", "origin", "order", *self.order})
        return dense.train(self.training)

    @override
    def extra_repr(self) -> str:
        return f"experts={len(self.up)}, from={self.origin.__name__}"


def is_experts(module: nn.Module) -> bool:
    """Whether a module declares its fused experts as `transformers` does, which need not be installed to find out."""
    declared = {"has_gate", "has_bias", "is_transposed"} <= vars(module).keys()
    return declared and all(p is not None and p.dim() == 3 for p in map(module._parameters.get, _names(module)))


def expert_layers(module: nn.Module) -> list[nn.Linear]:
    """The slices of fused experts as layers on the same memory, first all that lead up, then all that lead down."""
    if getattr(module, "_is_expert_parallel", False):
        raise Leave("its experts are spread over several processes: convert first, then distribute")
    layers = []
    for name in _names(module):
        weights, biases = module.get_parameter(name), module._parameters.get(f"{name}_bias")
        for expert in range(len(weights)):
            weight = part_of(weights, expert)
            if module.is_transposed:
                weight = nn.Parameter(weight.detach().t(), weight.requires_grad)
            layers.append(linear_on(weight, None if biases is None else part_of(biases, expert)))
    return layers


def _names(module: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _weights_of(module: nn.Module) -> set[str]:
    return {part for name in _names(module) for part in (name, f"{name}_bias")}


def _stacked(parts: Iterable[Any]) -> nn.Parameter:
    parts = list(parts)
    return nn.Parameter(torch.stack([part.detach() for part in parts]), any(part.requires_grad for part in parts))


def _take_over(module: nn.Module, other: nn.Module, *, but: set[str]) -> None:
    """What another module has, beside what each module has and what is named: numbers, functions, buffers, children."""
    common = vars(nn.Module()).keys()
    vars(module).update({k: v for k, v in vars(other).items() if k not in common and k not in but})
    for kind in ("_parameters", "_buffers", "_modules"):
        getattr(module, kind).update({k: v for k, v in getattr(other, kind).items() if k not in but})
    module._non_persistent_buffers_set |= other._non_persistent_buffers_set
