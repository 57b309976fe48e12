"""What takes the place of a saved tensor between forward and backward; each kind can make the tensor again."""

from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from noctule.memory.grouped import Grouped


class Kept(Protocol):
    """What the pack hook returns."""

    def restore(self) -> Tensor:
        """The saved tensor, or what is close to it."""
        ...


class Whole:
    """A tensor that is left alone."""

    def __init__(self, x: Tensor) -> None:
        # an output would hold the node that holds it
        self._x = x if x.grad_fn is None else x.detach()
        self._version = x._version

    def restore(self) -> Tensor:
        """The tensor itself."""
        check_version(self._x, self._version, self._x.shape)
        return self._x


class Packed:
    """The elements of a storage, encoded once for all the saved tensors that show them."""

    def __init__(self, data: Grouped, storage: StorageWeakRef) -> None:
        self.data, self.storage = data, storage


class View:
    """A saved tensor of some shape and strides, whose elements are packed."""

    def __init__(self, x: Tensor, packed: Packed, order: tuple[int, ...] | None) -> None:
        """`order` is that of the dimensions in memory, where there are gaps between the elements."""
        self.packed, self._order = packed, order
        self.shape, self.stride = x.shape, x.stride()
        self._witness, self._version = witness(x), x._version

    def restore(self) -> Tensor:
        """A tensor with the same shape and strides."""
        check_version(self._witness, self._version, self.shape)
        flat = self.packed.data.decode()
        if self._order is None:
            return flat.as_strided(self.shape, self.stride)
        x = torch.empty_strided(self.shape, self.stride, dtype=flat.dtype, device=flat.device)
        x.permute(self._order).copy_(flat.view([self.shape[d] for d in self._order]))
        return x


def witness(x: Tensor) -> Tensor:
    """An empty tensor that counts the changes in place of ``x``, and does not keep its memory."""
    y = x.detach()
    y.data = x.new_empty(0)
    return y


def check_version(x: Tensor, version: int, shape: torch.Size) -> None:
    """Raise, as autograd does without hooks, if the saved tensor was changed in place since.

    Raises:
        RuntimeError: it was.
    """
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{x.dtype} {list(shape)}] is at version {x._version}; expected version {version} instead. It was saved within "
            "compress_saved: change it before it is used, or change a copy"
        )
