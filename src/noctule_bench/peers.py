"""The other libraries that train on the non-zeros alone, made to hold exactly the weights of one of our layers."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noctule.measure.turns import Unavailable
from noctule.sparse.layers import SparseLinear


def sparselab(layer: SparseLinear) -> nn.Module:
    """SparseLab (https://pypi.org/project/sparselab/), without the free slots it would keep for growing: nothing grows here."""
    library, layout = _installed("sparselab"), _installed("sparselab.layout")
    topology = layer.topology
    csr = torch.sparse_csr_tensor(
        topology.row_ptr.int(), topology.columns.int(), layer.values.detach(), topology.shape, check_invariants=False
    )
    module = library.SparseLinear(1, 1, sparsity=0.0)  # its own constructor makes a dense matrix and draws other places
    module.out_features, module.in_features = topology.shape
    module.sparsity = 1.0 - layer.density
    module._csr = layout.from_torch_sparse_csr(csr, padding_ratio=0.0)
    module._values = nn.Parameter(torch.from_numpy(np.asarray(module._csr.values)))
    module.bias = _bias(layer)
    return module


def sparseprop(layer: SparseLinear) -> nn.Module:
    """SparseProp (https://pypi.org/project/sparseprop/; Nikdan et al. 2023, arXiv 2302.04852)."""
    kind = _installed("sparseprop.modules").SparseLinear
    topology = layer.topology
    module = kind.__new__(kind)  # its own constructor wants a dense matrix
    nn.Module.__init__(module)
    module.N, module.M = topology.shape
    module.W_val = nn.Parameter(layer.values.detach().clone())
    module.W_idx = (topology.row_ptr.int(), topology.columns.int())
    module.bias = _bias(layer)
    return module


def at_places(gradient: Tensor, module: nn.Module, layer: SparseLinear) -> Tensor:
    """The gradient of a module's weight as one number for each place (N,), in our order."""
    if gradient.layout is torch.sparse_csr:
        return gradient.values()
    if gradient.dim() == 2:
        return gradient.flatten()[layer.topology.keys()]
    if hasattr(module, "_csr"):  # SparseLab keeps a slot for every empty row
        return gradient[torch.from_numpy(np.array(module._csr.col_indices)) >= 0]  # type: ignore[attr-defined]
    return gradient


def index_bytes(module: nn.Module) -> int:
    """Bytes of a peer's index arrays, and of all it keeps beside them for the backward pass; 0 for other modules."""
    if hasattr(module, "W_idx"):
        return sum(t.nbytes for t in module.W_idx)  # type: ignore[union-attr]
    if hasattr(module, "index_bytes"):
        return int(module.index_bytes)  # type: ignore[arg-type]
    if not hasattr(module, "_csr"):
        return 0
    names = ("col_indices", "row_start", "row_nnz", "row_capacity")
    total = sum(np.asarray(getattr(module._csr, name)).nbytes for name in names)
    kept: tuple[Any, ...] | None = _installed("sparselab.ops")._transpose_cache.get(id(module._csr))
    if kept is not None:  # it copies the values into the transpose
        total += sum(np.asarray(getattr(kept[2], name)).nbytes for name in ("values", *names)) + kept[3].nbytes
    return total


def _installed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name.split(".")[0]):
            raise
        raise Unavailable("not installed: pip install noctule[bench] (how: benchmarks/README.md)") from error


def _bias(layer: SparseLinear) -> nn.Parameter:
    assert layer.bias is not None
    return nn.Parameter(layer.bias.detach().clone())
