"""`compress_saved`: the tensors that autograd saves for the backward pass, in a few bits an element.

Jin, Zhang, Jiang, Zhou, Li, Zhao, Wang, Tao 2022, "COMET: A Novel Memory-Efficient Deep Learning Training Framework by Using
Error-Bounded Lossy Compression" (VLDB; arXiv 2111.09562), and Chen et al. 2021, "ActNN" (ICML; arXiv 2104.14129). Differs from
both: any operation's saved tensors, not those of some layers; codes of a fixed width, with a bitmap where many elements are zero,
and no entropy coder, which runs slower than memory.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from noctule.memory.bound import AdaptiveBound
from noctule.memory.grouped import encode, group_of
from noctule.memory.kept import Kept, Packed, View, Whole
from noctule.memory.recompute import NormReLU, norm_relu

BITS = (8, 4, 2)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VIEWS = (
    "TBackward0",
    "ViewBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
)


class Saved:
    """What was saved within a `compress_saved`: bytes before and after, and the tensors that were left alone.

    A storage that several operations save counts once. Parameters and their views cost no memory of their own and do not count.
    """

    def __init__(self) -> None:
        self.tensors = 0
        """Distinct tensors that were compressed."""
        self.recomputed = 0
        """Of them, those of which only the signs are kept, since they are computed again."""
        self.bytes_before = 0
        """Bytes of the tensors that were compressed."""
        self.bytes_kept = 0
        """Bytes that were kept of them."""
        self.left: Counter[str] = Counter()
        """Why tensors were left alone, and how many times."""
        self.left_bytes: Counter[str] = Counter()
        """Bytes of the tensors left alone, by reason."""

    @property
    def ratio(self) -> float:
        """Times fewer bytes, with the tensors that were left alone; 1 where nothing was saved."""
        others = sum(self.left_bytes.values())
        return (self.bytes_before + others) / max(self.bytes_kept + others, 1) if self.bytes_before else 1.0

    def __str__(self) -> str:
        """One line."""
        left = ", ".join(f"{count} {why}" for why, count in self.left.items()) or "none"
        return (
            f"{self.tensors} tensors of {self.bytes_before / 1e6:.1f} MB in {self.bytes_kept / 1e6:.1f} MB "
            f"({self.ratio:.1f} times fewer, {self.recomputed} computed again); left alone: {left}"
        )


@contextmanager
def compress_saved(
    bits: int = 8, *, adaptive: AdaptiveBound | None = None, recompute: bool = True, least_bytes: int = 4096
) -> Iterator[Saved]:
    """Compress what autograd saves in the block's forward passes; the backward pass may come after the block.

    The forward pass is exact. In the backward pass an element is off by half a step of its grid at most: with 8 bits by 1/510 of
    the range of its neighbours. Zeros stay zeros. Left alone are parameters and what is a view or a cast of one, tensors that
    need no gradient (such as the data), other dtypes than float32, bfloat16 and float16, small ones, tensors that hold NaN or
    infinity, and those whose elements overlap. A saved tensor that is changed in place before backward raises, as it does without
    this.

    Args:
        bits: of an element: 8, 4 or 2.
        adaptive: bounds of the error, as an attached `AdaptiveBound` finds them, for the inputs of its layers; the rest and the
            first steps take ``bits``.
        recompute: keep only the signs of the output of a ReLU that follows a batch norm, and compute it from the norm's input.
        least_bytes: smaller tensors are left alone.

    Raises:
        ValueError: other bits, or bounds that are not attached.

    >>> layer = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 1))
    >>> with compress_saved(bits=8) as saved:
    ...     loss = layer(torch.randn(256, 64)).sum()
    >>> loss.backward()
    >>> saved.tensors, saved.bytes_before, saved.left["needs no gradient"]
    (1, 65536, 1)
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if least_bytes < 0:
        raise ValueError(f"least_bytes must be at least 0, got {least_bytes}")
    hooks = _Hooks(bits, adaptive, recompute, least_bytes)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        if adaptive is None:
            yield hooks.saved
        else:
            with adaptive.forward():
                yield hooks.saved


class _Hooks:
    """The pair of hooks of one block."""

    def __init__(self, bits: int, adaptive: AdaptiveBound | None, recompute: bool, least_bytes: int) -> None:
        self.saved = Saved()
        self._bits, self._adaptive, self._recompute, self._least_bytes = bits, adaptive, recompute, least_bytes
        self._packed: WeakValueDictionary[tuple[Any, ...], Packed | NormReLU] = WeakValueDictionary()
        self._whole: dict[int, StorageWeakRef] = {}
        self._peeking = False
        self._peeked: View | None = None

    @torch.no_grad()
    def pack(self, x: Tensor) -> Kept:
        """What is kept of a saved tensor."""
        if (why := self._why_left(x)) is not None:
            return self._leave(x, why)
        order = tuple(sorted(range(x.dim()), key=lambda d: (x.stride(d), x.shape[d]), reverse=True))
        rows = x.detach().permute(order)
        dense = rows.is_contiguous()
        if not dense and _overlaps(rows):
            return self._leave(x, "its elements overlap")
        # the weak reference keeps the storage's identity from being used again, which its address is not kept from
        storage = StorageWeakRef(x.untyped_storage())
        key = (storage.cdata, x._version, x.storage_offset(), x.dtype)
        key += (x.numel(),) if dense else (x.shape, x.stride())
        found = self._packed.get(key)
        if isinstance(found, NormReLU) and found.shows(x):
            return found
        if isinstance(found, Packed) and not found.storage.expired():
            return View(x, found, None if dense else order)
        if self._recompute and (again := norm_relu(x, storage, self._input_of)) is not None:
            self._count(x, again.nbytes)
            self.saved.recomputed += 1
            self._packed[key] = again
            if self._adaptive is not None:
                self._adaptive.recomputed(x, again.source.packed.storage.cdata, again.slope)
            return again
        step = None if self._adaptive is None else self._adaptive.step_of(x)
        data = encode(rows.reshape(-1).contiguous(), self._bits, group_of(tuple(rows.shape)), step)
        if data is None:
            return self._leave(x, "not finite")
        self._count(x, data.nbytes)
        packed = self._packed[key] = Packed(data, storage)
        return View(x, packed, None if dense else order)

    def unpack(self, kept: Kept) -> Tensor:
        """The saved tensor again."""
        if self._peeking and isinstance(kept, View):
            self._peeked = kept
            return torch.empty(())
        with torch.no_grad():
            return kept.restore()

    def _input_of(self, norm: Any) -> View | None:
        """What is kept of a norm's input, which only its node holds."""
        self._peeking, self._peeked = True, None
        try:
            _ = norm._saved_input  # asks `unpack`
        finally:
            self._peeking = False
        return self._peeked

    def _why_left(self, x: Tensor) -> str | None:
        if type(x) is not Tensor or x.layout is not torch.strided:
            return "a parameter" if isinstance(x, nn.Parameter) else "another kind of tensor"
        if not x.requires_grad:
            return "needs no gradient"
        if _of_parameter(x):
            return "a parameter"
        if x.dtype not in _DTYPES:
            return f"{x.dtype}"
        return "small" if x.nbytes < self._least_bytes else None

    def _leave(self, x: Tensor, why: str) -> Whole:
        self.saved.left[why] += 1
        if why != "a parameter":
            storage = StorageWeakRef(x.untyped_storage())
            if storage.cdata not in self._whole:
                self._whole[storage.cdata] = storage
                self.saved.left_bytes[why] += x.nbytes
        return Whole(x)

    def _count(self, x: Tensor, kept: int) -> None:
        self.saved.tensors += 1
        self.saved.bytes_before += x.nbytes
        self.saved.bytes_kept += kept


def _of_parameter(x: Tensor) -> bool:
    """Whether it is a leaf, a view of one, or one in another dtype."""
    root = x if x._base is None else x._base
    if root.is_leaf and root.requires_grad:
        return True
    node = root.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def _overlaps(rows: Tensor) -> bool:
    """Whether some elements of a tensor, its dimensions in the order of memory, may lie at one place."""
    reach = 1
    for size, stride in reversed([pair for pair in zip(rows.shape, rows.stride()) if pair[0] > 1]):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False
