"""What can a shipped model compute? The operators, by the names that files have for them."""

from noctule.runtime.operators.base import Buffer, Call, Operator, Plan
from noctule.runtime.operators.elementwise import (
    Activation,
    Affine,
    Clamp,
    LayerNorm,
    Pointwise,
    Quantize,
    Softmax,
)
from noctule.runtime.operators.pooling import Mean, Pool
from noctule.runtime.operators.products import Conv2d, Linear
from noctule.runtime.operators.shapes import Concat, Constant, Embedding, MatMul, Permute, Reshape, Slice

OPERATORS: dict[str, type[Operator]] = {
    "activation": Activation,
    "affine": Affine,
    "clamp": Clamp,
    "concat": Concat,
    "constant": Constant,
    "conv2d": Conv2d,
    "embedding": Embedding,
    "layer_norm": LayerNorm,
    "linear": Linear,
    "matmul": MatMul,
    "mean": Mean,
    "permute": Permute,
    "pointwise": Pointwise,
    "pool": Pool,
    "quantize": Quantize,
    "reshape": Reshape,
    "slice": Slice,
    "softmax": Softmax,
}

__all__ = [
    "OPERATORS",
    "Activation",
    "Affine",
    "Buffer",
    "Call",
    "Clamp",
    "Concat",
    "Constant",
    "Conv2d",
    "Embedding",
    "LayerNorm",
    "Linear",
    "MatMul",
    "Mean",
    "Operator",
    "Permute",
    "Plan",
    "Pointwise",
    "Pool",
    "Quantize",
    "Reshape",
    "Slice",
    "Softmax",
]
