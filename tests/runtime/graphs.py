"""Small graphs that use every operator."""

import numpy as np

from noctule.runtime.graph import Graph, Step
from noctule.runtime.operators import (
    Activation,
    Affine,
    Clamp,
    Concat,
    Constant,
    Conv2d,
    Embedding,
    LayerNorm,
    Linear,
    MatMul,
    Mean,
    Operator,
    Permute,
    Pointwise,
    Pool,
    Quantize,
    Reshape,
    Slice,
    Softmax,
)
from noctule.runtime.operators.elementwise import ACTIVATIONS
from noctule.runtime.values import Grid, Value
from noctule.runtime.weights import Places, Weight

rng = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def weight(rows: int, columns: int, density: float = 1.0, *, codes: bool = False, block: int = 1) -> Weight:
    flat = None
    if density < 1.0:
        flat = np.flatnonzero(rng.random(rows * columns // block) < density)
    count = rows * columns if flat is None else len(flat) * block
    places = None if flat is None else Places.smallest(flat, rows, columns // block)
    if codes:
        scales = (rng.random(rows) * 0.01 + 0.001).astype(np.float32)
        return Weight((rows, columns), rng.integers(-127, 128, count).astype(np.int8), 8, scales, None, places, block)
    return Weight((rows, columns), numbers(count) / np.float32(columns * density) ** 0.5, places=places, block=block)


class Build:
    def __init__(self, input: Value) -> None:
        global rng
        rng = np.random.default_rng(0)
        self.input, self.steps = input, []

    def __call__(self, operator: Operator, *of: int) -> int:
        self.steps.append(Step(f"module{len(self.steps)}", of or (len(self.steps),), operator))
        return len(self.steps)

    @property
    def graph(self) -> Graph:
        return Graph(self.input, self.steps)


def images() -> Graph:
    """Convolutions of all kinds, pooling, sums, attention and norms in float32."""
    add = Build(Value((3, 13, 11)))
    add(Conv2d(weight(13, 27), numbers(13), 0.0, kernel=(3, 3), padding=((1, 1), (1, 1))))
    add(Conv2d(weight(16, 117, 0.3), numbers(16), 0.1, kernel=(3, 3), stride=(2, 2), padding=((1, 1), (0, 2))))
    add(Pool("max", (3, 3), (2, 2), ((1, 1), (1, 1))))
    add(Pool("mean inside", (2, 2), (1, 1), ((1, 1), (0, 0))))
    branch = add(Conv2d(weight(16, 9), None, kernel=(3, 3), groups=16, padding=((2, 2), (2, 2)), dilation=(2, 2)))
    add(Affine(numbers(16), numbers(16), 0.0))
    for kind in ACTIVATIONS:
        add(Activation(kind))
    add(Pointwise("add"), branch, len(add.steps))
    add(Pointwise("multiply", 0.5), branch, len(add.steps))
    limited = add(Clamp(0.0, 0.0, 6.0))
    add(Conv2d(weight(16, 16), None, stride=(2, 1)), branch)
    add(Pool("mean", (1, 2), (1, 1), ((0, 0), (1, 1))))
    add(Slice(2, 1, 2))
    add(Slice(1, 1, 3))
    column = add(Concat(2), len(add.steps), len(add.steps))
    more = add(Conv2d(weight(16, 16), None, padding=((1, 2), (0, 0))), column)
    add(Concat(0), limited, more)
    add(Slice(0, 3, 29))
    channels, high, wide = add.graph.output.shape
    add(Reshape((channels, high * wide)))
    tokens = add(Permute((1, 0)))
    token = add(Constant(numbers(1, 26)), tokens)
    add(Concat(0), token, tokens)
    add(LayerNorm(numbers(26), numbers(26)))
    x = len(add.steps)
    query = add(Linear(weight(24, 26)))
    key = add(Linear(weight(24, 26, 0.2), numbers(24)), x)
    add(MatMul(True, 24**-0.5), query, key)
    scores = add(Softmax(1, True))
    add(Softmax(0), scores)
    add(MatMul(), len(add.steps), key)
    add(Mean(0, 0))
    add(Linear(weight(20, 24, 0.3, block=4), numbers(20), 0.0))
    return add.graph


def codes() -> Graph:
    """Integers: dense, sparse, blocks, depthwise, rounded in between or not."""
    add, grid = Build(Value((3, 9, 10))), Grid(0.02, 120)
    add(Quantize(grid))
    add(Conv2d(weight(8, 27, codes=True), numbers(8), 0.0, Grid(0.03, 0), kernel=(3, 3), padding=((1, 1), (1, 1))))
    add(Pool("max", (2, 2), (2, 2)))
    add(
        Conv2d(
            weight(8, 9, codes=True), numbers(8), 0.1, Grid(0.05, 30, 127), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 8
        )
    )
    add(Conv2d(weight(24, 72, 0.3, codes=True), None, 1.0, Grid(0.05, 128), (3, 3), (2, 2), ((1, 1), (1, 1))))
    channels, high, wide = add.graph.output.shape
    add(Reshape((channels * high * wide,)))
    add(Linear(weight(64, channels * high * wide, 0.1, codes=True), numbers(64), 0.0, Grid(0.02, 0)))
    add(Linear(weight(40, 64, 0.3, codes=True, block=4), numbers(40), 0.0, Grid(0.02, 3)))
    add(Linear(weight(10, 40, codes=True), numbers(10)))
    return add.graph


def tokens() -> Graph:
    """An embedding and a mean."""
    add = Build(Value((5,), "tokens"))
    add(Embedding(numbers(11, 6)))
    add(Mean(0, 0))
    return add.graph
