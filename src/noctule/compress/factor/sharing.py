"""Weights that share a few values: k-means centroids, and for each weight the number of its centroid.

Han, Mao, Dally 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding",
arXiv 1510.00149: k-means on a layer's weights from evenly spread centres, then training of the shared values, whose gradient is the
sum of those of their weights. Differs from the paper: places of sparse layers stay as they are, only values are coded; the Huffman
coder is zlib's, over bytes that hold one, two, four or eight codes. It takes 0 to 0.9 % more bytes than the codes' entropy for
1,000 x 1,000 normal weights, 7 % less to 1 % more for a trained layer, where neighbours in a byte are alike (2 to 256 codes).

Shapes: N weights, K codes.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from noctule.codecs import reference
from noctule.codecs.levels import pack_codes, unpack_codes
from noctule.compress.factor.factored import check_plain
from noctule.core.convert import Leave, Rule
from noctule.sparse.layers import SparseLayer


@dataclass(frozen=True, kw_only=True)
class Share:
    """`nn.Linear`, `nn.Conv2d`, sparse layers -> the same whose weights share ``codes`` values, which stay trainable.

    The layer's parameter becomes the code book (K,), and a buffer holds the codes of the weights, side by side in whole bits; the
    weight is looked up at each forward. `torch.nn.utils.parametrize.remove_parametrizations` makes it a plain one again.

    Args:
        codes: values of a layer, from 2 to 256; the authors take 256 for convolutions and 32 for linear layers.
        iterations: of k-means at most.

    >>> from noctule.core.convert import convert_
    >>> model = convert_(nn.Sequential(nn.Linear(100, 50)), Share(codes=16)).model
    >>> len(model[0].weight.unique()), [p.numel() for p in model.parameters()]
    (16, [50, 16])
    """

    codes: int = 16
    iterations: int = 100

    def __post_init__(self) -> None:
        if not 2 <= self.codes <= 256 or self.iterations < 1:
            raise ValueError(
                f"codes must lie from 2 to 256 and iterations be at least 1, got {self.codes} and {self.iterations}"
            )

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """The rule, knowing which layers' weights are their own."""
        own = {*modules.values()}

        def rule(module: nn.Module) -> nn.Module | None:
            is_sparse = isinstance(module, SparseLayer)
            if not is_sparse and not isinstance(module, nn.Linear | nn.Conv2d):
                return None
            name = "values" if is_sparse else "weight"
            if parametrize.is_parametrized(module) or name not in module._parameters:
                raise Leave("its weight is computed from other parameters")
            if module not in own:
                raise Leave("its weight is tied")
            if not is_sparse:
                check_plain(module, nn.Linear, nn.Conv2d, replaced=False)
            weight: Tensor = getattr(module, name)
            book = CodeBook(clusters(weight, self.codes, self.iterations), self.codes, weight.shape)
            stored = book.packed.nbytes + self.codes * weight.itemsize
            if stored >= weight.nbytes:
                raise Leave(f"code book and codes take {stored:,} bytes, its weights {weight.nbytes:,}")
            parametrize.register_parametrization(module, name, book)
            return module

        return rule


class CodeBook(nn.Module):
    """The parametrization of a weight whose numbers are looked up: code book (K,) -> weight.

    In a state dict the codes are entropy-coded.

    Args:
        index_N: code of each weight, uint8.
        codes: K.
        shape: of the weight.
    """

    packed: Tensor

    def __init__(self, index_N: Tensor, codes: int, shape: torch.Size) -> None:
        super().__init__()
        self.codes, self.shape, self.bits = codes, shape, (codes - 1).bit_length()
        self.register_buffer("packed", pack_codes(index_N, self.bits).clone(), persistent=False)

    def index(self) -> Tensor:
        """The code of each weight, (N,) uint8."""
        is_traced = torch.compiler.is_compiling()
        decode = reference.unpack_bits if is_traced and self.bits < 8 else unpack_codes
        return decode(self.packed, self.shape.numel(), self.bits)

    @override
    def get_extra_state(self) -> Tensor:
        coder = zlib.compressobj(9, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
        codes = pack_codes(self.index(), self._symbol_bits).cpu().numpy().tobytes()
        return torch.frombuffer(bytearray(coder.compress(codes) + coder.flush()), dtype=torch.uint8)

    @override
    def set_extra_state(self, state: Any) -> None:
        n, bits = self.shape.numel(), self._symbol_bits
        try:
            codes = bytearray(zlib.decompress(state.cpu().numpy().tobytes()))
        except (AttributeError, zlib.error) as error:
            raise ValueError(
                f"the codes of a shared weight are torn ({error}): load a state as it was saved"
            ) from error
        right = len(codes) == -(-n * bits // 8)
        index = unpack_codes(torch.frombuffer(codes, dtype=torch.uint8), n, bits) if right else None
        if index is None or int(index.max()) >= self.codes:
            raise ValueError(
                f"these are not the codes of {n} weights that share {self.codes} values: convert the model with the same Share and "
                "where= as the one saved"
            )
        self.packed = pack_codes(index, self.bits).to(self.packed.device)

    @property
    def _symbol_bits(self) -> int:
        """Bits of a code where a byte holds a whole number of codes: 1, 2, 4 or 8."""
        return 1 << (self.bits - 1).bit_length()

    @override
    def forward(self, codes_K: Tensor) -> Tensor:
        """The weight."""
        return codes_K.index_select(0, self.index().to(torch.int32)).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The code book nearest to a weight: the mean of each code's numbers, 0 where no weight has the code."""
        index = self.index().to(torch.int64)
        sums = torch.zeros(self.codes, dtype=torch.float64, device=weight.device)
        sums.index_add_(0, index, weight.detach().flatten().double())
        return (sums / torch.bincount(index, minlength=self.codes).clamp(min=1)).to(weight.dtype)

    @override
    def extra_repr(self) -> str:
        return f"codes={self.codes}, bits={self.bits}, weights={self.shape.numel()}"


def clusters(weight: Tensor, codes: int, iterations: int = 100) -> Tensor:
    """The code (N,) uint8 of each number, by k-means from centres that are evenly spread between the smallest and the largest.

    In one dimension clusters are intervals, so a step is a search in the sorted numbers. At most ``codes`` different numbers get
    a code each.

    Raises:
        Leave: the weight has no numbers, or one is not finite.
    """
    x_N = weight.detach().flatten().double()
    if x_N.is_meta or not x_N.numel() or not bool(x_N.isfinite().all()):
        raise Leave("its weight has no numbers, or one that is not finite")
    distinct = x_N.unique()
    if len(distinct) <= codes:
        return torch.searchsorted(distinct, x_N).to(torch.uint8)
    ordered = x_N.sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    lowest, highest = ordered[0], ordered[-1]
    centres = lowest + (highest - lowest) * torch.linspace(0, 1, codes, dtype=x_N.dtype, device=x_N.device)
    for _ in range(iterations):
        inner = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])
        counts = edges.diff()
        moved = torch.where(counts > 0, sums[edges].diff() / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.searchsorted((centres[1:] + centres[:-1]) / 2, x_N).to(torch.uint8)
