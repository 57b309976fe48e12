"""Multi-head attention whose projections are layers of their own, which may be sparse."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from noctule.core.convert import Leave
from noctule.sparse.layers.foreign import linear_on, part_of
from noctule.sparse.layers.layout import feature_major, row_major
from noctule.sparse.layers.sparse_linear import SparseLinear
from noctule.sparse.layers.stand_in import StandIn

Projection = nn.Linear | SparseLinear


class SparseAttention(nn.Module):
    """A drop-in for ``nn.MultiheadAttention`` with a layer each for queries, keys, values and the output.

    Masks, weights and shapes are as there; ``bias_k``, ``bias_v`` and ``add_zero_attn`` do not exist.

    Args:
        q_proj: from the queries' E features to E.
        k_proj: from the keys' features to E; these may be more or fewer.
        v_proj: from the values' features to E.
        out_proj: from E to E.
        num_heads: H, each with E / H of the features.
        dropout: of the attention weights in training.
        batch_first: inputs and outputs are (B, L, E), not (L, B, E).

    >>> attention = SparseAttention(*(SparseLinear(64, 64, density=0.1) for _ in range(4)), num_heads=4, batch_first=True)
    >>> x = torch.randn(2, 10, 64)
    >>> y, weights = attention(x, x, x)
    >>> y.shape, weights.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    """

    def __init__(
        self,
        q_proj: Projection,
        k_proj: Projection,
        v_proj: Projection,
        out_proj: Projection,
        *,
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.embed_dim, self.kdim, self.vdim = q_proj.in_features, k_proj.in_features, v_proj.in_features
        widths = [q_proj.out_features, k_proj.out_features, v_proj.out_features, out_proj.in_features]
        if {*widths, out_proj.out_features} != {self.embed_dim}:
            raise ValueError(
                f"queries have {self.embed_dim} features, so all projections must come to as many; those of queries, keys and "
                f"values come to {widths[:3]}, that of the output leads from {widths[3]} to {out_proj.out_features}"
            )
        if num_heads < 1 or self.embed_dim % num_heads:
            raise ValueError(f"{self.embed_dim} features cannot be shared out to {num_heads} heads")
        self.num_heads, self.head_dim = num_heads, self.embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first

    # What torch's encoder and its layers ask before they take their fused path of evaluation, which reads dense weights.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    @property
    def in_proj_weight(self) -> Tensor:
        """A stand-in, for other people's code."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        held = [layer.values if isinstance(layer, SparseLinear) else layer.weight for layer in layers]
        return StandIn(held, (3 * self.embed_dim, self.embed_dim))

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and where asked for the attention weights: (B, L, S), or (B, H, L, S) if they are not averaged.

        Args:
            query: (B, L, E) with ``batch_first``, else (L, B, E); (L, E) without a batch.
            key: the same with its own length S and features.
            value: the same with the length of the keys and its own features.
            key_padding_mask: (B, S), True or minus infinity where a key is none.
            need_weights: return the attention weights, which costs time and memory.
            attn_mask: (L, S) or (B H, L, S), True or minus infinity where a query does not look.
            average_attn_weights: over the heads.
            is_causal: says that ``attn_mask`` is the causal one.
        """
        if isinstance(query, Proxy):
            raise RuntimeError(
                "torch.fx cannot look into a SparseAttention, whose way depends on its inputs: trace its dense twin, which "
                "convert_(model, ToDense()) puts in its place"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal only says what kind of mask attn_mask is: give that mask too")
        if query.is_nested:
            if need_weights or attn_mask is not None or key_padding_mask is not None or query is not key:
                raise ValueError(
                    "nested inputs attend to themselves, without masks and weights: pass need_weights=False, or pad them"
                )
            return self._nested(query), None
        if query.dim() not in (2, 3):
            raise ValueError(f"expected queries of two or three dimensions, got shape {tuple(query.shape)}")
        if query.dim() == 2:
            batch = 0 if self.batch_first else 1
            query, key, value = _each(lambda x: x.unsqueeze(batch), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            y, weights = self(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return y.squeeze(batch), None if weights is None else weights.squeeze(0)

        if isinstance(self.k_proj, SparseLinear) and key is value:  # read two or three times: transposed once
            query, key, value = _each(feature_major, query, key, value)
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        dropout = self.dropout if self.training else 0.0
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _mask(attn_mask, key_padding_mask, (*q.shape[:3], k.shape[2]), q.dtype)
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)
        return row_major(self.out_proj(y.flatten(2))), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, E) or (L, B, E) -> (B, H, L, D)."""
        x = row_major(x).unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _nested(self, x: Tensor) -> Tensor:
        """Sequences of their own lengths, attending to themselves."""
        lengths = torch.tensor([len(part) for part in x.unbind()], device=x.device)
        padded = x.to_padded_tensor(0.0)
        beyond = torch.arange(padded.shape[1], device=x.device) >= lengths[:, None]
        if not self.batch_first:
            padded = padded.transpose(0, 1)
        y, _ = self(padded, padded, padded, beyond, need_weights=False)
        y = y if self.batch_first else y.transpose(0, 1)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(y, lengths, strict=True)], layout=x.layout)

    @classmethod
    def from_dense(cls, dense: nn.MultiheadAttention, projections: Sequence[Projection]) -> Self:
        """A dense attention with these in the place of its four projections."""
        return cls(
            *projections,
            num_heads=dense.num_heads,
            dropout=dense.dropout,
            batch_first=dense.batch_first,
        ).train(dense.training)

    def to_dense(self) -> nn.MultiheadAttention:
        """An ``nn.MultiheadAttention`` with the same function, zeros included."""
        layers = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        q, k, v, out = (layer.to_dense() if isinstance(layer, SparseLinear) else layer for layer in layers)
        biases = [layer.bias for layer in (q, k, v) if layer.bias is not None]
        if len(biases) + (out.bias is not None) not in (0, 4):
            raise ValueError("nn.MultiheadAttention has a bias for all its projections or for none")
        dense = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=out.bias is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        if dense.in_proj_weight is None:
            for name, layer in (("q", q), ("k", k), ("v", v)):
                setattr(dense, f"{name}_proj_weight", layer.weight)
        else:
            dense.in_proj_weight = _joined([q.weight, k.weight, v.weight])
        if biases:
            dense.in_proj_bias = _joined(biases)
        dense.out_proj.weight, dense.out_proj.bias = out.weight, out.bias
        return dense.train(self.training)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` takes instead, which can hold torch's own modules only."""
        return self.to_dense()

    @override
    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout:g}, batch_first={self.batch_first}"


def projections_of(dense: nn.MultiheadAttention) -> list[nn.Linear]:
    """The projections of queries, keys and values and that of the output as layers, on the same memory."""
    if dense.bias_k is not None or dense.add_zero_attn:
        raise Leave(f"it has {'bias_k and bias_v' if dense.bias_k is not None else 'add_zero_attn'}")
    packed, bias, width, out = dense.in_proj_weight, dense.in_proj_bias, dense.embed_dim, dense.out_proj
    if type(out) not in (NonDynamicallyQuantizableLinear, nn.Linear):
        raise Leave(f"its out_proj is a {type(out).__name__}, not a plain nn.Linear")
    separate: tuple[Any, ...] = (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight)
    layers = []
    for at, weight in enumerate(separate):
        rows = slice(at * width, (at + 1) * width)
        weight = part_of(packed, rows) if weight is None else weight
        layers.append(linear_on(weight, None if bias is None else part_of(bias, rows)))
    return [*layers, linear_on(out.get_parameter("weight"), None if bias is None else out.get_parameter("bias"))]


def _each(change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """All three changed; what was one tensor stays one."""
    new_key = change(key)
    new_value = new_key if value is key else change(value)
    return new_key if query is key else change(query), new_key, new_value


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """What is added to scores of this shape, (B, H, L, S), or to be expanded to it."""
    B, H, L, S = shape
    masks = []
    if attn_mask is not None:
        if attn_mask.shape not in ((L, S), (B * H, L, S)):
            raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}, expected {(L, S)} or {(B * H, L, S)}")
        added = _added(attn_mask, dtype)
        masks.append(added if added.dim() == 2 else added.view(B, H, L, S))
    if key_padding_mask is not None:
        if key_padding_mask.shape != (B, S):
            raise ValueError(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected {(B, S)}")
        masks.append(_added(key_padding_mask, dtype)[:, None, None, :])
    return sum(masks[1:], masks[0]) if masks else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)
    return mask.to(dtype)


def _joined(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([p.detach() for p in parameters]), any(p.requires_grad for p in parameters))
