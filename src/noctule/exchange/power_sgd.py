"""Gradients of low rank: two thin matrices travel instead of a large one.

Vogels, Karimireddy, Jaggi 2019, "PowerSGD", arXiv 1905.13727. Differs from the authors' code: the thin matrices go through any
exchange, so they can be rounded too, or averaged over any path; and what the approximation leaves out is kept by the name of the
parameter.

Shapes: a gradient as a matrix (O, I), rank R.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from noctule.core.exchange import Exchange, Work
from noctule.core.finite import all_finite
from noctule.core.remap import Remap


class PowerSGD(Exchange):
    """One step of subspace iteration from where the last exchange stopped: P = M Q, averaged and made orthonormal, then Q = Mᵀ P.

    Two exchanges in a row. Vectors, and matrices that thin ones would not be smaller than, go as they are with the first. What
    P Qᵀ leaves out is owed to the next exchange: error feedback is part of the method.

    Args:
        rank: R.
        over: what averages the thin matrices, such as ``Channel(path=AllReduce())``; rounded to 16 bits with a
            ``Compress(Cast(torch.bfloat16), error_feedback=False)`` and ``path=AllGather()``: what that leaves out is owed too.
        seed: of the first Q; the same on all workers.
    """

    at_once = True

    def __init__(self, rank: int, *, over: Exchange, seed: int = 0) -> None:
        """Nothing is sent yet."""
        if rank < 1:
            raise ValueError(f"an approximation has at least rank 1, got {rank}")
        self.rank, self.over, self.seed = rank, over, seed
        self.owed: dict[str, Tensor] = {}
        """Key -> what is still to be sent of it."""
        self.basis: dict[str, Tensor] = {}
        """Key -> Q (I, R) of the last exchange."""

    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The means, of matrices approximately; all workers get the same bits.

        Where any of them is not finite, or the second exchange does not come about after the first, nothing is kept of either.
        """
        given = [
            x + self.owed[key].view(x.shape).to(x.device) if key in self.owed else x
            for x, key in zip(tensors, keys, strict=True)
        ]
        matrices = {key: x.flatten(1).float() for x, key in zip(given, keys, strict=True) if self._is_low(x)}
        before = self.over.state_dict()
        try:
            small = [x.to(like.dtype) for x, like in zip(given, tensors, strict=True)]
            means, bases = self._exchanged(small, keys, matrices)
        except BaseException:
            self.over.load_state_dict(before)
            raise
        totals = [means[key].view(x.shape).to(x.dtype) for x, key in zip(tensors, keys, strict=True)]
        if not all(map(all_finite, totals)):
            self.over.load_state_dict(before)
            return totals
        self.basis |= bases
        if not self.over.counts:  # of a worker that has nothing nobody took anything
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
        means = dict(zip(keys, self.over(first, [f"{key} P" if key in matrices else key for key in keys]), strict=True))
        if not matrices:
            return means, {}
        thin = {key: _orthonormal(means[key]) for key in matrices}
        right = self.over([_times(m.t(), thin[key]) for key, m in matrices.items()], [f"{key} Q" for key in matrices])
        bases = dict(zip(matrices, right, strict=True))
        return means | {key: thin[key] @ q.t() for key, q in bases.items()}, bases

    @property
    def counts(self) -> bool:
        """Whether what averages the thin matrices counts this worker."""
        return self.over.counts

    def share(self, message: bytes) -> list[bytes]:
        """What every worker has to say, in their order."""
        return self.over.share(message)

    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Work:
        """What an exchange of such tensors would take."""
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
        works = [self.over.rehearse(part, [str(at) for at in range(len(part))]) for part in (first, right) if part]
        return Work(
            seconds + sum(work.seconds for work in works),
            sum(work.sent_bytes for work in works),
            sum(work.rounds for work in works),
        )

    def release(self) -> dict[str, Tensor]:
        """What is owed; not of thin matrices, which others cannot send."""
        owed, self.owed = self.owed, {}
        return owed | {key: x for key, x in self.over.release().items() if not key.endswith((" P", " Q"))}

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """What is owed follows its connections; a matrix of another shape begins with another Q."""
        self.over.remapped(key, remap, shape)
        if key in self.owed:
            self.owed[key] = remap.apply(self.owed[key].flatten()).view(shape)
        if key in self.basis and self.basis[key].shape[0] != math.prod(shape[1:]):
            del self.basis[key]

    def state_dict(self) -> dict[str, Any]:
        """What is owed, and where the iteration is."""
        return {"owed": dict(self.owed), "basis": dict(self.basis), "over": self.over.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.owed, self.basis = dict(state["owed"]), dict(state["basis"])
        self.over.load_state_dict(state["over"])

    def __repr__(self) -> str:
        """What must be alike on all workers."""
        return f"PowerSGD({self.rank}, over={self.over!r}, seed={self.seed})"

    def _is_low(self, x: Tensor) -> bool:
        if x.dim() < 2 or not x.numel():
            return False
        rows, columns = x.shape[0], x.numel() // x.shape[0]
        return self.rank * (rows + columns) < rows * columns

    def _first(self, key: str, matrix: Tensor) -> Tensor:
        """Q of the last exchange, or a random one that all workers draw alike."""
        if key not in self.basis:
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randn(matrix.shape[1], self.rank, generator=generator).to(matrix.device)
        return self.basis[key]


def _times(m: Tensor, thin: Tensor) -> Tensor:
    """m @ thin, several times as fast with the thin factor first."""
    return (thin.t() @ m.t()).t()


def _orthonormal(p: Tensor) -> Tensor:
    """Columns that span the same; of a matrix that is not finite, NaN."""
    if not all_finite(p):
        return torch.full_like(p, torch.nan)
    return torch.linalg.qr(p).Q
