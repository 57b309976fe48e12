"""The rows of the benchmarks: each makes its own layer out of the same sparse layer, so that all compute the same function."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from noctule.measure.turns import Process
from noctule.sparse.layers import SparseLinear
from noctule.sparse.layers.onednn import OneDnnLinear
from noctule_bench.csr import CsrLinear, CsrOwnBackward
from noctule_bench.peers import sparselab, sparseprop


@dataclass(frozen=True)
class Contestant:
    """A way to do a linear layer."""

    name: str
    process: Process
    make: Callable[[SparseLinear], nn.Module]
    dense: bool = False
    """It works on all places, not on the stored ones alone."""
    dtype: torch.dtype = torch.float32
    """Of its inputs and parameters."""
    autocast: bool = False
    """Its products run in bfloat16, its parameters stay in float32."""

    @property
    def tolerance(self) -> float:
        """How far its results may lie from the right ones, by the largest of them."""
        return 0.03 if self.autocast or self.dtype is torch.bfloat16 else 1e-4


def _itself(layer: SparseLinear) -> nn.Module:
    return layer


def _linear(layer: SparseLinear) -> nn.Module:
    return layer.to_dense()


def _onednn(layer: SparseLinear) -> nn.Module:
    return OneDnnLinear(layer.to_dense())


def _bfloat16(layer: SparseLinear) -> nn.Module:
    return layer.to_dense().bfloat16()


def _sparse_bfloat16(layer: SparseLinear) -> nn.Module:
    return deepcopy(layer).bfloat16()


TORCH = Process("torch")
NOCTULE = Contestant("noctule", Process("noctule"), _itself)
NOCTULE_BF16 = Contestant("noctule bf16", Process("noctule"), _sparse_bfloat16, dtype=torch.bfloat16)
NOCTULE_AUTOCAST = Contestant("noctule bf16 autocast", Process("noctule"), _itself, autocast=True)
LINEAR = Contestant("dense fp32", TORCH, _linear, dense=True)
ONEDNN = Contestant("dense fp32 oneDNN", TORCH, _onednn, dense=True)
BF16 = Contestant("dense bf16", TORCH, _bfloat16, dense=True, dtype=torch.bfloat16)
AUTOCAST = Contestant("dense bf16 autocast", TORCH, _linear, dense=True, autocast=True)
CSR = Contestant("torch CSR", TORCH, CsrLinear)
CSR_OWN = Contestant("torch CSR, own backward", TORCH, CsrOwnBackward)
SPARSELAB = Contestant("sparselab", Process("sparselab"), sparselab)
SPARSELAB_PASSIVE = Contestant(
    "sparselab, passive waiting",
    Process("sparselab, passive waiting", (("OMP_WAIT_POLICY", "passive"),)),
    sparselab,
)
"""It brings an OpenMP runtime of its own, which fights with torch's; threads that wait passively fight less."""
SPARSEPROP = Contestant("sparseprop", Process("sparseprop"), sparseprop)

CONTESTANTS = {
    c.name: c
    for c in (
        NOCTULE, NOCTULE_BF16, NOCTULE_AUTOCAST, LINEAR, ONEDNN, BF16, AUTOCAST, CSR, CSR_OWN, SPARSELAB, SPARSELAB_PASSIVE,
        SPARSEPROP,
    )
}  # fmt: skip


def worth_it(contestant: Contestant, threads: int) -> bool:
    """How threads wait matters only where there are several."""
    return contestant is not SPARSELAB_PASSIVE or threads > 1
