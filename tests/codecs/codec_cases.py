"""The codecs that the laws are tried on, and ways to run them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from noctule.codecs import (
    QSGD,
    Affine,
    Cast,
    Codec,
    Exact,
    LowRank,
    NaturalCompression,
    NaturalDithering,
    RandomK,
    SignSGD,
    TernGrad,
    TopK,
    native,
    steps,
)

SETS = native._native.instruction_sets() if native._native is not None else []
CODECS: list[Codec] = [
    Exact(),
    Cast(torch.bfloat16),
    Cast(torch.float16),
    NaturalCompression(),
    NaturalCompression(100),
    NaturalCompression(entropy=True),
    NaturalCompression(2**31 - 1),
    Affine(),
    Affine(4, group=50),
    Affine(8, stochastic=True),
    Affine(8, group=2**31 - 1, stochastic=True),
    Affine(4, stochastic=True),
    NaturalDithering(),
    NaturalDithering(1, p=1, bucket=33),
    NaturalDithering(127, p=2),
    NaturalDithering(5, p=3),
    QSGD(),
    QSGD(1, bucket=33),
    QSGD(100),
    QSGD(127),
    TernGrad(),
    TernGrad(20),
    TernGrad(2**31 - 1),
    SignSGD(),
    SignSGD(37),
    SignSGD(2**31 - 1),
    TopK(0.01),
    TopK(0.5),
    TopK(1.0),
    TopK(0.01, at_least=5),
    TopK(0.1, values=NaturalCompression()),
    TopK(0.2, values=NaturalCompression(entropy=True)),
    TopK(0.2, values=Affine(4)),
    RandomK(0.02),
    RandomK(0.5, values=NaturalCompression()),
    RandomK(0.5, values=SignSGD()),
    RandomK(1.0),
    LowRank(1),
    LowRank(4, iterations=1),
]


@contextmanager
def running(instruction_set: str, threads: int = 1) -> Iterator[None]:
    """With this instruction set ("reference": plain torch), and really this many threads, however little there is to do."""
    before = native._native.instruction_set(), torch.get_num_threads(), native.PARALLEL_FROM, steps.available
    torch.set_num_threads(threads)
    native.PARALLEL_FROM = 0
    if instruction_set == "reference":
        steps.available = lambda: False
    else:
        native._native.use_instruction_set(instruction_set)
    try:
        yield
    finally:
        native._native.use_instruction_set(before[0])
        torch.set_num_threads(before[1])
        native.PARALLEL_FROM, steps.available = before[2:]
