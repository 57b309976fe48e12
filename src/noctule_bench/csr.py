"""Sparse linear layers made of what torch itself has: matrices in compressed sparse row form (CSR)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from noctule.sparse.layers import SparseLinear


class CsrLinear(nn.Module):
    """A CSR parameter, and torch's own gradients: of its ways to multiply the fastest that gives gradients at the places only."""

    def __init__(self, layer: SparseLinear) -> None:
        """Copy the weights."""
        super().__init__()
        topology = layer.topology
        self.weight = nn.Parameter(
            _csr(topology.row_ptr.int(), topology.columns.int(), layer.values.detach().clone(), topology.shape)
        )
        self.bias = nn.Parameter(_bias(layer).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, I) -> (B, O)."""
        return torch.sparse.mm(self.weight, x.t()).t() + self.bias


class CsrOwnBackward(nn.Module):
    """The same sparse products of MKL, called as well as one can: no copy that autograd would make, and a transpose kept."""

    index: tuple[Tensor, Tensor]
    index_back: tuple[Tensor, Tensor, Tensor]
    shape: tuple[int, int]

    def __init__(self, layer: SparseLinear) -> None:
        """Copy the weights and the index of the transpose."""
        super().__init__()
        topology, back = layer.topology, layer.topology.transposed
        self.index = (topology.row_ptr.int(), topology.columns.int())
        self.index_back = (back.row_ptr.int(), back.columns.int(), back.slots.long())
        self.shape = topology.shape
        self.values = nn.Parameter(layer.values.detach().clone())
        self.bias = nn.Parameter(_bias(layer).detach().clone())

    @property
    def index_bytes(self) -> int:
        """Bytes of all index arrays."""
        return sum(t.nbytes for t in (*self.index, *self.index_back))

    def forward(self, x: Tensor) -> Tensor:
        """(B, I) -> (B, O)."""
        return _CsrProduct.apply(x, self.values, self.bias, self)  # type: ignore[return-value]


class _CsrProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, values: Tensor, bias: Tensor, layer: CsrOwnBackward) -> Tensor:
        ctx.save_for_backward(x_BI, values)
        ctx.layer = layer
        return torch.addmm(bias[:, None], _csr(*layer.index, values, layer.shape), x_BI.t()).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, values = ctx.saved_tensors
        layer: CsrOwnBackward = ctx.layer
        row_ptr, columns, slots = layer.index_back
        dx_BI = None
        if ctx.needs_input_grad[0]:
            dx_BI = (_csr(row_ptr, columns, values[slots], layer.shape[::-1]) @ dy_BO.t()).t()
        places = _csr(*layer.index, values, layer.shape)
        dvalues = torch.sparse.sampled_addmm(places, dy_BO.t(), x_BI, beta=0.0).values()
        return dx_BI, dvalues, dy_BO.sum(0), None


def _csr(row_ptr: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_csr_tensor(row_ptr, columns, values, shape, check_invariants=False)


def _bias(layer: SparseLinear) -> Tensor:
    assert layer.bias is not None
    return layer.bias
