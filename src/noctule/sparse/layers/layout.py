"""From one layout of activations to the other, at the pace of the native transpose.

A sparse layer reads and writes features whose batch is contiguous; attention, norms and residual sums want samples whose features
are. Each takes the other's layout too, and is slower for it.
"""

from typing import Any

import torch
from torch import Tensor

from noctule import kernels
from noctule.sparse.layers.surroundings import eager, first_order


def feature_major(x: Tensor) -> Tensor:
    """``x`` (..., I) with the batch contiguous within a feature, ``x`` itself where it is; its gradient comes back by samples.

    For an input that several sparse layers read: each would transpose it for itself.
    """
    x_BI = x.reshape(-1, x.shape[-1])
    if x_BI.shape[0] == 1 or x_BI.stride(0) == 1:
        return x
    if not eager(x):
        return x_BI.t().contiguous().t().view(x.shape)
    return _FeatureMajor.apply(x_BI).view(x.shape)  # type: ignore[union-attr]


def row_major(x: Tensor) -> Tensor:
    """``x`` (..., I) with the features contiguous within a sample, ``x`` itself where they are.

    >>> from noctule import SparseLinear
    >>> y = SparseLinear(64, 32, density=0.1)(torch.randn(16, 64))
    >>> y.stride(), row_major(y).stride()
    ((1, 16), (32, 1))
    """
    if x.shape[-1] == 1 or x.stride(-1) == 1:
        return x
    if not eager(x):
        return x.contiguous()
    return _RowMajor.apply(x.reshape(-1, x.shape[-1])).view(x.shape)  # type: ignore[union-attr]


class _FeatureMajor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor) -> Tensor:
        return kernels.feature_major(x_BI).t().data

    @staticmethod
    def backward(ctx: Any, dy_BI: Tensor) -> Tensor:
        return _rows(dy_BI) if first_order(dy_BI) else dy_BI


class _RowMajor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor) -> Tensor:
        return _rows(x_BI)

    @staticmethod
    def backward(ctx: Any, dy_BI: Tensor) -> Tensor:
        return dy_BI  # a sparse layer, which is where such an input comes from, brings it into its own layout


def _rows(x_BI: Tensor) -> Tensor:
    return x_BI if x_BI.stride(1) == 1 else kernels.feature_major(x_BI.t())
