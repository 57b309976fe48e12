"""A small decoder-only transformer over characters, with rotary positions.

Su, Lu, Pan, Murtadha, Wen, Liu 2021, arXiv 2104.09864. Differs from the paper: the two features of a pair are not neighbours but
half a head apart, as most code has it since.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule.sparse.layers.layout import row_major


class Transformer(nn.Module):
    """Blocks of causal attention and a ReLU network, each behind its normalisation, of plain linear layers.

    Args:
        vocabulary: V, how many characters there are.
        width: of the residual stream.
        depth: blocks.
        heads: of each attention, which share the width.
        dropout: of attention weights and of what each part of a block adds, in [0, 1).

    >>> model = Transformer(100, width=64, depth=2, heads=4)
    >>> model(torch.zeros(8, 32, dtype=torch.int64)).shape
    torch.Size([8, 100, 32])
    """

    def __init__(self, vocabulary: int, *, width: int, depth: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if min(vocabulary, width, depth, heads) < 1 or width % (2 * heads):
            raise ValueError(
                "vocabulary, width, depth and heads must be at least 1 and each head have an even share of the width, got "
                f"{vocabulary}, {width}, {depth} and {heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.characters = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.characters.weight, std=0.5)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, numbers: Tensor) -> Tensor:
        """(B, T) -> logits of the next characters (B, V, T), the classes second, as torch's losses take them."""
        return self.head(self.norm(self.blocks(self.characters(numbers)))).transpose(-1, -2)


class Block(nn.Module):
    """A pre-normalised block: causal attention, then a ReLU network, each added to the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), CausalAttention(width, heads, dropout)
        self.network_norm = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)."""
        x = x + self.dropout(row_major(self.attention(self.attention_norm(x))))
        return x + self.dropout(row_major(self.network(self.network_norm(x))))


class CausalAttention(nn.Module):
    """Multi-head self-attention of each position to itself and those before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)."""
        qkv = row_major(self.qkv(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(qkv[:2])
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, qkv[2], dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of (..., T, D): each pair of features rotated by an angle proportional to the position."""
    length, width = x.shape[-2:]
    slowness = 10_000.0 ** (torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] / slowness
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
