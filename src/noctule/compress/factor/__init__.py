"""How does a trained layer get by with fewer numbers? Low rank, shared weights, separable convolutions."""

from noctule.compress.factor.factored import Factored
from noctule.compress.factor.huffman import entropy_bytes, pack, unpack
from noctule.compress.factor.low_rank import Factor, low_rank, tucker2
from noctule.compress.factor.separable import ToSeparable, separable
from noctule.compress.factor.sharing import Share, pack_state, shared_sizes, unpack_state

__all__ = [
    "Factor",
    "Factored",
    "Share",
    "ToSeparable",
    "entropy_bytes",
    "low_rank",
    "pack",
    "pack_state",
    "separable",
    "shared_sizes",
    "tucker2",
    "unpack",
    "unpack_state",
]
