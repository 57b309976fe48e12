"""What `layers` times in its processes: forward and all gradients of one layer, checked before it is timed."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from noctule import kernels
from noctule.kernels import IDENTITY, reference
from noctule.measure.turns import Unavailable, at_forget
from noctule.sparse.layers import SparseLinear
from noctule_bench.contestants import NOCTULE, Contestant
from noctule_bench.peers import at_places

ROW_MAJOR = "row-major"
"""Inputs and the gradients of outputs lie as torch makes them, (B, features) contiguous."""
FEATURE_MAJOR = "feature-major"
"""They are transposed views of (features, B), as one sparse layer hands them to the next."""
ROW_MAJOR_OUT = "row-major in and out"
"""Outputs and the gradients of inputs are copied to row-major too: the worst case, a layer alone among strangers."""
KERNELS = "kernels alone"
"""The three products on feature-major tensors, without a module and autograd."""

LAYOUTS = (ROW_MAJOR, FEATURE_MAJOR, ROW_MAJOR_OUT, KERNELS)


def layouts_of(contestant: Contestant) -> tuple[str, ...]:
    """In which layouts a contestant is timed."""
    return LAYOUTS if contestant is NOCTULE else (ROW_MAJOR, FEATURE_MAJOR)


def build(
    contestant: Contestant, size: int, density: float, batch: int, layout: str
) -> tuple[Callable[[], object], None]:
    """The step to time, after its results were compared with the reference's.

    Raises:
        Unavailable: they are wrong.
    """
    at_forget(_drop)
    layer = _layer(size, density)
    x, dy = _tensors(size, batch, layout)
    if layout == KERNELS:
        return _kernels(layer, x, dy), None
    module = _module(contestant, size, density)
    x = x.to(contestant.dtype).requires_grad_()
    parameters = list(module.parameters())
    forward: Callable[[Tensor], Tensor] = _autocast(module) if contestant.autocast else module
    dy = dy.to(torch.bfloat16) if contestant.autocast or contestant.dtype is torch.bfloat16 else dy

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = forward(x)
        return y, torch.autograd.grad(y, [x, *parameters], dy)

    def step_row_major() -> tuple[Tensor, Tensor]:
        y = forward(x).contiguous()
        dx, *_ = torch.autograd.grad(y, [x, *parameters], dy)
        return y, dx.contiguous()

    y, (dx, dweight, dbias) = step()
    dvalues = at_places(dweight, module, layer)
    for what, found, right in zip(
        ("output", "dx", "dweight", "dbias"), (y, dx, dvalues, dbias), _right(size, density, batch, layout), strict=True
    ):
        error = float((found.detach().float() - right).abs().max() / right.abs().max().clamp(min=1e-30))
        if not error < contestant.tolerance:
            raise Unavailable(f"wrong result: {what} is off by {error:.1e} of its largest number")
    return (step_row_major if layout == ROW_MAJOR_OUT else step), None


def build_peak(product: str, size: int) -> tuple[Callable[[], object], int]:
    """A large dense float32 product, and its flops: what the machine can do."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    if product == "oneDNN":
        return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), 2 * size**3
    return lambda: a @ b, 2 * size**3


@cache
def _layer(size: int, density: float) -> SparseLinear:
    return SparseLinear(size, size, density=density, generator=torch.Generator().manual_seed(0))


@cache
def _module(contestant: Contestant, size: int, density: float) -> nn.Module:
    return contestant.make(_layer(size, density))


def _tensors(size: int, batch: int, layout: str) -> tuple[Tensor, Tensor]:
    """x and dy, (B, size) each, with the same numbers in every process."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(size, batch, generator=generator).t() for _ in range(2))
    return (x, dy) if layout in (FEATURE_MAJOR, KERNELS) else (x.contiguous(), dy.contiguous())


@cache
def _right(size: int, density: float, batch: int, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dvalues and dbias by plain torch on the non-zeros."""
    layer = _layer(size, density)
    values, bias = layer.values.detach(), layer.bias
    x, dy = _tensors(size, batch, layout)
    y_OB, _ = reference.spmm(layer.topology, values, x.t(), None if bias is None else bias.detach(), IDENTITY, False)
    dx_IB = reference.spmm_t(layer.topology, values, dy.t())
    return y_OB.t(), dx_IB.t(), reference.sddmm(layer.topology, dy.t(), x.t()), dy.sum(0)


def _kernels(layer: SparseLinear, x: Tensor, dy: Tensor) -> Callable[[], object]:
    values, topology, x_IB, dy_OB = layer.values.detach(), layer.topology, x.t(), dy.t()

    def step() -> object:
        y = kernels.spmm(topology, values, x_IB)
        return y, kernels.spmm_t(topology, values, dy_OB), kernels.sddmm(topology, dy_OB, x_IB)

    return step


def _autocast(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    return forward


def _drop() -> None:
    for cached in (_layer, _module, _right):
        cached.cache_clear()
