"""One tensor for convolution -> batch norm -> ReLU: the input of the norm is kept, its output is computed again.

A norm saves its input, and what follows its ReLU saves the output: two tensors for one. Chen et al. 2021 (ActNN, arXiv 2104.14129)
name it as the half of the bytes that no codec saves. No module is replaced here: the graph says what made the saved tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from noctule.codecs.steps import code_for
from noctule.memory.kept import View, check_version, witness

_POSITIVE = 2.0**-100
Seen = Callable[[Any], View | None]
"""Node of a batch norm -> what is kept of its input, or None."""


class NormReLU:
    """The output of a ReLU that follows a batch norm in training, as a function of what is kept of the norm's input.

    Which elements are positive is kept in a bit each: with an error near zero another gradient would pass the ReLU.
    """

    def __init__(self, x: Tensor, storage: StorageWeakRef, source: View, norm: Any) -> None:
        self.source, self.storage = source, storage
        mean_C, inverse_C = norm._saved_result1, norm._saved_result2
        weight_C, bias_C = norm._saved_weight, _bias(norm)
        slope_C = inverse_C if weight_C is None else inverse_C * weight_C.detach()
        shift_C = -mean_C * slope_C
        self._slope_C, self._shift_C = slope_C, shift_C if bias_C is None else shift_C + bias_C.detach()
        flat = (x > 0).as_strided((x.numel(),), (1,)).to(torch.uint8)
        self._positive = code_for(x.device).pack_bits(flat, 1)
        self._witness, self._version = witness(x), x._version

    @property
    def nbytes(self) -> int:
        """Bytes that are kept beside the norm's input: a bit an element."""
        return self._positive.nbytes

    @property
    def slope(self) -> float:
        """How many times the error of the norm's input the output has: the median of the channels."""
        return float(self._slope_C.abs().median())

    def shows(self, x: Tensor) -> bool:
        """Whether this is the whole of the tensor, and its storage is the one that was saved."""
        same = x.shape == self.source.shape and x.stride() == self.source.stride
        return same and not self.storage.expired()

    def restore(self) -> Tensor:
        """Norm and ReLU again, with the mean and variance of the forward pass."""
        check_version(self._witness, self._version, self.source.shape)
        x = self.source.restore()
        sides = (1, -1, *[1] * (x.dim() - 2))
        x.mul_(self._slope_C.view(sides)).add_(self._shift_C.view(sides)).clamp_(min=_POSITIVE)
        positive = code_for(x.device).unpack_bits(self._positive, x.numel(), 1)
        return x.mul_(positive.as_strided(x.shape, x.stride()))


def norm_relu(x: Tensor, storage: StorageWeakRef, seen: Seen) -> NormReLU | None:
    """How to compute ``x`` again, if it is the output of a ReLU on a batch norm whose input is packed."""
    node = x.grad_fn
    if node is None or node.name() != "ReluBackward0":
        return None
    norm: Any = node.next_functions[0][0]
    if norm is None or norm.name() != "NativeBatchNormBackward0" or not norm._saved_training:
        return None
    source = seen(norm)
    if source is None or source.shape != x.shape or source.stride != x.stride():
        return None
    return NormReLU(x, storage, source, norm)


def _bias(norm: Any) -> Tensor | None:
    """The bias, which the norm does not save; autograd holds it to add up its gradient."""
    holder = norm.next_functions[2][0]
    return None if holder is None else holder.variable
