"""The sparse product for derivatives of any order and the transforms of ``torch.func``.

Three products are closed under differentiation: y = W x, its way back Wᵀ dy, and the gradient dy xᵀ at the places of W. Each is
linear in its two factors, and what is left of it when one factor is taken away is another of the three. `SparseProduct` is the
first with its backward, fused and not differentiable; here they are one by one.

Shapes: B batch, I in, O out, N stored weights.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from noctule import kernels
from noctule.core.topology import Topology
from noctule.kernels import Epilogue, Kept, reference
from noctule.sparse.layers.surroundings import has_storage, transforms_active


class _Bilinear(torch.autograd.Function):
    """A product of two factors over the places of a topology."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep both factors."""
        a, b, ctx.topology = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """What the kind says, for the factors that need it."""
        a, b = ctx.saved_tensors
        da = cls.without_first(grad, b, ctx.topology) if ctx.needs_input_grad[0] else None
        db = cls.without_second(grad, a, ctx.topology) if ctx.needs_input_grad[1] else None
        return da, db, None

    @classmethod
    def jvp(cls, ctx: Any, da: Tensor | None, db: Tensor | None, _: None) -> Tensor | None:  # type: ignore[override]
        """The product rule, which an outer forward mode must be able to follow too: torch turns it off in here."""
        with forward_ad._set_fwd_grad_enabled(True):
            a, b = (forward_ad.unpack_dual(factor).primal for factor in ctx.saved_tensors)
            if da is None:
                return None if db is None else apply(cls, a, db, ctx.topology)
            along_a = apply(cls, da, b, ctx.topology)
            return along_a if db is None else along_a + apply(cls, a, db, ctx.topology)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, topology: Topology) -> tuple:  # type: ignore[override]
        """One weight for all: one product of a larger batch; else one product each."""
        a_dim, b_dim, _ = in_dims
        if a_dim is None and b_dim is not None and cls is not Gradient:
            b_FKB = b.movedim(b_dim, 1)
            y_FL = apply(cls, a, b_FKB.flatten(1), topology)
            return y_FL.unflatten(1, b_FKB.shape[1:]), 1
        pairs = (
            (a if a_dim is None else a.select(a_dim, k), b if b_dim is None else b.select(b_dim, k))
            for k in range(info.batch_size)
        )
        return torch.stack([apply(cls, *pair, topology) for pair in pairs]), 0

    @staticmethod
    @abstractmethod
    def without_first(grad: Tensor, b: Tensor, topology: Topology) -> Tensor:
        """The gradient of the first factor."""

    @staticmethod
    @abstractmethod
    def without_second(grad: Tensor, a: Tensor, topology: Topology) -> Tensor:
        """The gradient of the second factor."""


class Product(_Bilinear):
    """Y (O, B) = W X, of values (N,) and X (I, B)."""

    @staticmethod
    def forward(values: Tensor, x_IB: Tensor, topology: Topology) -> Tensor:
        """One product."""
        return kernels.spmm(topology, values, kernels.feature_major(x_IB.t()))[0].data

    @staticmethod
    def without_first(grad: Tensor, b: Tensor, topology: Topology) -> Tensor:
        """Of the values."""
        return apply(Gradient, grad, b, topology)

    @staticmethod
    def without_second(grad: Tensor, a: Tensor, topology: Topology) -> Tensor:
        """Of the input."""
        return apply(WayBack, a, grad, topology)


class WayBack(_Bilinear):
    """dX (I, B) = Wᵀ dY, of values (N,) and dY (O, B)."""

    @staticmethod
    def forward(values: Tensor, dy_OB: Tensor, topology: Topology) -> Tensor:
        """One product."""
        return kernels.spmm_t(topology, values, kernels.feature_major(dy_OB.t())).data

    @staticmethod
    def without_first(grad: Tensor, b: Tensor, topology: Topology) -> Tensor:
        """Of the values."""
        return apply(Gradient, b, grad, topology)

    @staticmethod
    def without_second(grad: Tensor, a: Tensor, topology: Topology) -> Tensor:
        """Of dY."""
        return apply(Product, a, grad, topology)


class Gradient(_Bilinear):
    """dW (N,) = dY Xᵀ at the places, of dY (O, B) and X (I, B)."""

    @staticmethod
    def forward(dy_OB: Tensor, x_IB: Tensor, topology: Topology) -> Tensor:
        """One product."""
        return kernels.sddmm(topology, kernels.feature_major(dy_OB.t()), kernels.feature_major(x_IB.t()))

    @staticmethod
    def without_first(grad: Tensor, b: Tensor, topology: Topology) -> Tensor:
        """Of dY."""
        return apply(Product, grad, b, topology)

    @staticmethod
    def without_second(grad: Tensor, a: Tensor, topology: Topology) -> Tensor:
        """Of X."""
        return apply(WayBack, grad, a, topology)


def apply(product: type[_Bilinear], a: Tensor, b: Tensor, topology: Topology) -> Tensor:
    """One of the three products, inside autograd."""
    if transforms_active() or all(map(has_storage, (a, b))):
        return product.apply(a, b, topology)  # type: ignore[return-value]
    a, b = map(unwrap_if_dead, (a, b))  # of a transform that is over, as where the function that vjp returned is called
    if all(map(has_storage, (a, b))):
        return product.apply(a, b, topology)  # type: ignore[return-value]
    return _batched(product, a, b, topology)


def _batched(product: type[_Bilinear], a: Tensor, b: Tensor, topology: Topology) -> Tensor:
    """Inside the older vmap of `torch.autograd` (``is_grads_batched``, ``vectorize``), which does not ask functions how."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = [None if has_storage(t) else 0 for t in (a, b)]
    known: Any = torch
    a, b = (t if dim is None else known._remove_batch_dim(t, level, 1, 0) for t, dim in zip((a, b), dims, strict=True))
    size = len(a if dims[0] == 0 else b)
    y, dim = product.vmap(_Size(size), (*dims, None), a, b, topology)
    return known._add_batch_dim(y.movedim(dim, 0).contiguous(), 0, level)


class _Size(NamedTuple):
    batch_size: int


def any_order(
    x_BI: Tensor, values: Tensor, bias: Tensor | None, topology: Topology, epilogue: Epilogue, dropout: bool
) -> Tensor:
    """y (B, O) = epilogue(x (B, I) Wᵀ + bias) in steps that can be differentiated and transformed again and again.

    Dropout drops what the fused product would drop after the same seed; how ``vmap`` draws is its ``randomness``.
    """
    z_OB = apply(Product, values, x_BI.t(), topology)
    if bias is not None:
        z_OB = z_OB + bias.to(z_OB.dtype)[:, None]
    return epilogue_on(z_OB, epilogue, dropout).t()


def epilogue_on(z: Tensor, epilogue: Epilogue, dropout: bool) -> Tensor:
    """Activation and dropout of an epilogue on z, features first, in plain torch; dropout only where asked for."""
    y = z if epilogue.slope == 1.0 else torch.where(z > 0, z, z * epilogue.slope)
    if not epilogue.dropout or not dropout:
        return y
    seed = torch.randint(2**62, (), device="cpu").to(z.device)
    words = reference.random_words(seed, z.shape[0], z[:1].numel(), device=z.device)
    return torch.where(words.view(z.shape) >= epilogue.drop_below, y * epilogue.scale, 0.0)


def gradients(
    dy_BO: Tensor,
    x_IB: Tensor,
    values: Tensor,
    kept: Kept,
    topology: Topology,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dz (O, B), and of what is needed dx (B, I), dvalues (N,), dbias (O,), all of which can be differentiated again."""
    needs_x, needs_values, needs_bias = needs
    dz_OB = dy_BO.t() * epilogue_slopes(kept, dy_BO.t()) if kept.changed else dy_BO.t()
    dx_BI = apply(WayBack, values, dz_OB, topology).t() if needs_x else None
    dvalues = apply(Gradient, dz_OB, x_IB, topology) if needs_values else None
    return dz_OB, dx_BI, dvalues, dz_OB.sum(1) if needs_bias else None


def epilogue_slopes(kept: Kept, like: Tensor) -> Tensor:
    """The derivative of an epilogue at each place of an output, features first: a constant."""
    ones = torch.ones(like.shape, dtype=like.dtype, device=like.device)
    return kernels.epilogue_backward(ones, kept, bias=False)[0]
