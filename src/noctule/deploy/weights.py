"""Layers of torch as the weights of a shipped model: zeros left out where that is smaller, codes as they are.

Shapes: O rows, K columns, N stored weights.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from noctule.compress.quantize.integer_layer import IntegerLayer
from noctule.compress.quantize.static import Int8Layer
from noctule.core.topology import Places as TorchPlaces
from noctule.runtime.values import Grid
from noctule.runtime.weights import Places, Weight
from noctule.sparse.layers import SparseLayer

BLOCK = 4
BOOK, BOOK_SAMPLE = 256, 2048
"""Values that a book has at most, and weights that are looked at before all are."""
FULL = 0.85
"""The share of weights in blocks of four columns from which the blocks are stored and computed whole."""


def weight_of_layer(module: Any) -> Weight:
    """The weight of a linear layer or a convolution, dense, sparse or of codes."""
    linear = not isinstance(module, nn.Conv2d) and getattr(module, "geometry", None) is None
    if isinstance(module, IntegerLayer):
        shape = module.matrix_shape or (module.widths[1], module.integers()[0].numel())
        codes, scales = array(module.integers()).reshape(-1), array(module.scales)
        return made(shape, codes, flat_of(module.places), scales, blocks=linear and module.bits == 8, bits=module.bits)
    values = module.values if isinstance(module, SparseLayer) else module.weight
    topology = module.topology if isinstance(module, SparseLayer) else None
    shape = topology.shape if topology is not None else (values.shape[0], values[0].numel())
    return made(shape, array(values.float()).reshape(-1), flat_of(topology), None, blocks=linear)


def grid_of_layer(module: Any) -> Grid | None:
    """What the inputs of an `Int8Layer` are rounded to; None for the others."""
    return Grid(*module.grid) if isinstance(module, Int8Layer) else None


def made(
    shape: tuple[int, ...],
    numbers: np.ndarray,
    flat: np.ndarray | None,
    scales: np.ndarray | None,
    *,
    blocks: bool,
    bits: Any = 8,
) -> Weight:
    """A weight from all numbers of a matrix, or from those at places, in the form that takes the fewest bytes."""
    rows, columns = shape[0], shape[1]
    each = numbers.itemsize if scales is None else bits / 8
    if flat is None and bits != 1 and np.count_nonzero(numbers) < numbers.size:
        flat = np.flatnonzero(numbers)
        numbers = numbers[flat]
    places: Places | None = None
    block: Literal[1, 4] = 1
    if flat is not None:
        if not len(flat):
            flat, numbers = np.zeros(1, np.int64), np.zeros(1, numbers.dtype)
        if blocks and columns % BLOCK == 0 and len(held := np.unique(flat // BLOCK)) * BLOCK * FULL <= len(flat):
            whole = np.zeros((len(held), BLOCK), numbers.dtype)
            whole[np.searchsorted(held, flat // BLOCK), flat % BLOCK] = numbers
            flat, numbers, block = held, whole.reshape(-1), BLOCK
        places = Places.smallest(flat, rows, columns // block)
        if bits != 1 and places.data.nbytes + numbers.size * each >= rows * columns * each:  # one bit has no zero
            whole = np.zeros((rows * columns // block, block), numbers.dtype)
            whole[flat] = numbers.reshape(-1, block)
            places, block, numbers = None, 1, whole.reshape(-1)
    if scales is None:
        floats = np.ascontiguousarray(numbers, np.float32)
        if (book := shared(floats)) is not None:
            indices = np.searchsorted(book, floats).astype(np.uint8)
            return Weight((rows, columns), indices, 8, None, book, places, block)
        return Weight((rows, columns), floats, places=places, block=block)
    if bits < 8:
        numbers = packed(numbers, bits)
    return Weight((rows, columns), numbers, bits, scales, None, places, block)


def shared(floats: np.ndarray) -> np.ndarray | None:
    """The few values that all weights share, sorted; None where they are not few or share too little to save bytes."""
    if len(np.unique(floats[:BOOK_SAMPLE])) > BOOK:
        return None
    book = np.unique(floats)
    return book if len(book) <= BOOK and floats.size + book.nbytes < floats.nbytes else None


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 4 bits or one side by side, the first in the lowest bits."""
    positive = (codes > 0 if bits == 1 else codes + 8).astype(np.uint8)
    each = np.unpackbits(positive[:, None], axis=1, bitorder="little", count=bits)
    return np.packbits(each.reshape(-1), bitorder="little")


def flat_of(topology: TorchPlaces | None) -> np.ndarray | None:
    """The places of a topology in reading order."""
    if topology is None:
        return None
    row_ptr, columns = array(topology.row_ptr).astype(np.int64), array(topology.columns).astype(np.int64)
    return np.repeat(np.arange(len(row_ptr) - 1), np.diff(row_ptr)) * topology.shape[1] + columns


def array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array."""
    return tensor.detach().cpu().contiguous().numpy() if tensor.dtype != torch.bfloat16 else array(tensor.float())
