"""Layers that store their non-zeros only, and the rules that put them in a model."""

from noctule.layers.activations import AllReLU
from noctule.layers.attention import SparseAttention
from noctule.layers.experts import SparseExperts
from noctule.layers.fuse import FuseEpilogue
from noctule.layers.keep_layout import KeepLayout
from noctule.layers.product import Watch
from noctule.layers.sparse_conv1d import SparseConv1d
from noctule.layers.sparse_conv2d import SparseConv2d
from noctule.layers.sparse_layer import SparseLayer
from noctule.layers.sparse_linear import SparseLinear
from noctule.layers.to_sparse import ToDense, ToSparse

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
