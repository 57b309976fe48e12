"""How does a layer hold its non-zeros alone? The sparse layers, and the rules that put them in a model."""

from noctule.sparse.layers.activations import AllReLU
from noctule.sparse.layers.attention import SparseAttention
from noctule.sparse.layers.experts import SparseExperts
from noctule.sparse.layers.fuse import FuseEpilogue
from noctule.sparse.layers.keep_layout import KeepLayout
from noctule.sparse.layers.product import Watch
from noctule.sparse.layers.sparse_conv1d import SparseConv1d
from noctule.sparse.layers.sparse_conv2d import SparseConv2d
from noctule.sparse.layers.sparse_layer import SparseLayer
from noctule.sparse.layers.sparse_linear import SparseLinear
from noctule.sparse.layers.to_sparse import ToDense, ToSparse

__all__ = [
    "AllReLU",
    "FuseEpilogue",
    "KeepLayout",
    "SparseAttention",
    "SparseConv1d",
    "SparseConv2d",
    "SparseExperts",
    "SparseLayer",
    "SparseLinear",
    "ToDense",
    "ToSparse",
    "Watch",
]
