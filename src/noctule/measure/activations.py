"""How many bytes of activations a forward pass keeps for its backward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Kept:
    """The bytes of the storages that autograd keeps, each counted once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all storages together."""
        return sum(self._sizes.values())

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor."""
        storage = tensor.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[Kept]:
    """Count what autograd keeps of the block's forward passes, the model's parameters aside.

    >>> layer = nn.Linear(100, 10)
    >>> with kept_for_backward(layer) as kept:
    ...     loss = layer(torch.randn(4, 100)).sum()
    >>> kept.nbytes
    1600
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = Kept()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.see(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
