"""Low-rank gradients: two thin matrices are averaged instead of a large one.

Vogels, Karimireddy, Jaggi 2019, "PowerSGD", arXiv 1905.13727. Differs from the authors' code: the thin matrices go through any
exchange, so they can be rounded too, or averaged over any path; and residuals are kept by the name of the parameter.

Shapes: a gradient as a matrix (O, I), rank R.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from noctule.core.exchange import Cost, Exchange, Wrapped
from noctule.core.finite import all_finite
from noctule.core.random import generator
from noctule.core.remap import Remap


class PowerSGD(Wrapped):
    """An exchange of low-rank matrices: one step of subspace iteration, P = M Q averaged and made orthonormal, then Q = Mᵀ P.

    It makes two exchanges in a row, and begins with the Q of the last time. Vectors, and matrices that thin ones would not be
    smaller than, are averaged as they are, with the first. The residual of P Qᵀ is owed to the next exchange: error feedback is
    part of the method.

    Args:
        rank: R.
        inner: averages the thin matrices, such as ``Channel(path=AllReduce())``; rounded to 16 bits with a
            ``Compress(Cast(torch.bfloat16), error_feedback=False)`` and ``path=AllGather()``: that residual is owed too.
    """

    def __init__(self, rank: int, *, inner: Exchange) -> None:
        if rank < 1:
            raise ValueError(f"an approximation has at least rank 1, got {rank}")
        self.rank, self._inner = rank, inner
        self.owed: dict[str, Tensor] = {}
        """Key -> the residual, still to be sent."""
        self.basis: dict[str, Tensor] = {}
        """Key -> Q (I, R) of the last exchange."""

    @property
    @override
    def inner(self) -> Exchange:
        return self._inner

    @property
    @override
    def at_once(self) -> bool:
        return True

    @override
    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The means, of matrices approximately; all workers get the same bits.

        If a mean is not finite, or the second exchange fails after the first, nothing of either is kept.
        """
        given = [
            x + self.owed[key].view(x.shape).to(x.device) if key in self.owed else x
            for x, key in zip(tensors, keys, strict=True)
        ]
        matrices = {key: x.flatten(1).float() for x, key in zip(given, keys, strict=True) if self._is_low(x)}
        before = self.inner.state_dict()
        try:
            small = [x.to(like.dtype) for x, like in zip(given, tensors, strict=True)]
            means, bases = self._exchanged(small, keys, matrices)
        except BaseException:
            self.inner.load_state_dict(before)
            raise
        totals = [means[key].view(x.shape).to(x.dtype) for x, key in zip(tensors, keys, strict=True)]
        if not all(map(all_finite, totals)):
            self.inner.load_state_dict(before)
            return totals
        self.basis |= bases
        if not self.inner.counts:  # nothing of this worker has entered the means
            return totals
        for key, total in zip(keys, totals, strict=True):
            self.owed.pop(key, None)
            if key in matrices:
                self.owed[key] = (matrices[key] - total.flatten(1).float()).view(total.shape)
        return totals

    def _exchanged(
        self, tensors: Sequence[Tensor], keys: Sequence[str], matrices: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mean of each tensor, and Q of each matrix (O, I)."""
        first = [
            _times(matrices[key], self._first(key, matrices[key])) if key in matrices else x
            for x, key in zip(tensors, keys, strict=True)
        ]
        means = dict(
            zip(keys, self.inner(first, [f"{key} P" if key in matrices else key for key in keys]), strict=True)
        )
        if not matrices:
            return means, {}
        thin = {key: _orthonormal(means[key]) for key in matrices}
        right = self.inner([_times(m.t(), thin[key]) for key, m in matrices.items()], [f"{key} Q" for key in matrices])
        bases = dict(zip(matrices, right, strict=True))
        return means | {key: thin[key] @ q.t() for key, q in bases.items()}, bases

    @override
    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Cost:
        started = time.perf_counter()
        first, right = [], []
        for x in tensors:
            if self._is_low(x):
                m = x.flatten(1).float()
                first.append(_times(m, torch.ones(m.shape[1], self.rank, device=m.device)))
                right.append(_times(m.t(), _orthonormal(first[-1])))
                m = m - first[-1] @ right[-1].t()
            else:
                first.append(x)
        seconds = time.perf_counter() - started
        costs = [self.inner.rehearse(part, [str(at) for at in range(len(part))]) for part in (first, right) if part]
        return Cost(
            seconds + sum(cost.seconds for cost in costs),
            sum(cost.sent_bytes for cost in costs),
            sum(cost.rounds for cost in costs),
        )

    @override
    def release(self) -> dict[str, Tensor]:
        """The residuals of the gradients; those of thin matrices are dropped, since another exchange cannot send them."""
        owed, self.owed = self.owed, {}
        return owed | {key: x for key, x in self.inner.release().items() if not key.endswith((" P", " Q"))}

    @override
    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """Move the residual; a matrix of another shape begins with another Q."""
        self.inner.remapped(key, remap, shape)
        if key in self.owed:
            self.owed[key] = remap.apply(self.owed[key].flatten()).view(shape)
        if key in self.basis and self.basis[key].shape[0] != math.prod(shape[1:]):
            del self.basis[key]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"owed": dict(self.owed), "basis": dict(self.basis), "over": self.inner.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.owed, self.basis = dict(state["owed"]), dict(state["basis"])
        self.inner.load_state_dict(state["over"])

    @override
    def __repr__(self) -> str:
        return f"PowerSGD({self.rank}, inner={self.inner!r})"

    def _is_low(self, x: Tensor) -> bool:
        if x.dim() < 2 or not x.numel():
            return False
        rows, columns = x.shape[0], x.numel() // x.shape[0]
        return self.rank * (rows + columns) < rows * columns

    def _first(self, key: str, matrix: Tensor) -> Tensor:
        """Q of the last exchange, or a random one that is equal on all workers."""
        if key not in self.basis:
            return torch.randn(matrix.shape[1], self.rank, generator=generator("PowerSGD", key)).to(matrix.device)
        return self.basis[key]


def _times(m: Tensor, thin: Tensor) -> Tensor:
    """m @ thin, several times as fast with the thin factor first."""
    return (thin.t() @ m.t()).t()


def _orthonormal(p: Tensor) -> Tensor:
    """Orthonormal columns that span the same space; NaN if a number is not finite."""
    if not all_finite(p):
        return torch.full_like(p, torch.nan)
    return torch.linalg.qr(p).Q
