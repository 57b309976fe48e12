"""Count the bytes that a model and its optimizers hold, every storage once, index arrays included."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Footprint:
    """Bytes held, by what they are for; a storage with two uses counts for the first of these."""

    parameters: int
    """How many numbers the parameters hold, tied ones once."""
    weights_bytes: int
    buffer_bytes: int
    index_bytes: int
    """Places of the weights: topologies and the indices of torch's own sparse tensors."""
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All bytes together."""
        return self.weights_bytes + self.buffer_bytes + self.index_bytes + self.gradient_bytes + self.optimizer_bytes

    def as_dict(self) -> dict[str, int]:
        """The numbers, with `total_bytes`, as plain JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}

    def __str__(self) -> str:
        """One line to read."""
        parts = [f"{name.removesuffix('_bytes')} {n:,} B" for name, n in self.as_dict().items() if "bytes" in name]
        return f"{self.parameters:,} parameters: " + ", ".join(parts)


def footprint(model: nn.Module, *optimizers: Any, all_gradients: bool = False) -> Footprint:
    """Count what a model, its gradients and the state of its optimizers hold in memory now.

    Index arrays are those of each module's `topology`, where it has one with `nbytes`, and of torch's sparse tensors.
    `all_gradients` counts the gradients of a training step as if each trainable parameter had one.

    >>> footprint(nn.Linear(10, 10), all_gradients=True).total_bytes
    880
    """
    storages = _Storages()
    parameters = list(model.parameters())
    weights_bytes, index_bytes = storages.add(parameters)
    buffer_bytes, more = storages.add(model.buffers())
    index_bytes += more
    index_bytes += _topology_bytes(model)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradient_bytes = sum(storages.add(gradients))
    if all_gradients:
        gradient_bytes += sum(_numel_bytes(p) for p in parameters if p.requires_grad and p.grad is None)
    states = [tensor for optimizer in optimizers for tensor in _tensors(optimizer.state)]
    return Footprint(
        parameters=sum(parameter.numel() for parameter in parameters),
        weights_bytes=weights_bytes,
        buffer_bytes=buffer_bytes,
        index_bytes=index_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=sum(storages.add(states)),
    )


class _Storages:
    """Sizes of storages, each counted the first time it is seen."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """Bytes of what is new in these tensors: (values, indices)."""
        values_bytes = indices_bytes = 0
        for tensor in tensors:
            values, indices = _parts(tensor)
            values_bytes += sum(map(self._new_bytes, values))
            indices_bytes += sum(map(self._new_bytes, indices))
        return values_bytes, indices_bytes

    def _new_bytes(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:  # unlike data_ptr(), it also tells empty and meta tensors apart
            return 0
        self._seen.add(storage._cdata)
        return storage.nbytes()


def _parts(tensor: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The dense tensors that a tensor is made of: (values, indices)."""
    if is_traceable_wrapper_subclass(tensor):
        inner = [_parts(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return [t for values, _ in inner for t in values], [t for _, indices in inner for t in indices]
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return [tensor._values()], [tensor._indices()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.values()], [tensor.crow_indices(), tensor.col_indices()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.values()], [tensor.ccol_indices(), tensor.row_indices()]
    return [tensor], []


def _numel_bytes(tensor: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in _parts(tensor)[0])


def _topology_bytes(model: nn.Module) -> int:
    topologies = {id(t): t for module in model.modules() if (t := getattr(module, "topology", None)) is not None}
    return sum(t.nbytes for t in topologies.values() if isinstance(getattr(t, "nbytes", None), int))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
