"""A trained convolution as a depthwise and a pointwise one.

Guo, Li, Lin, Chen, Li 2018, "Network Decoupling: From Regular to Depthwise Separable Convolutions", arXiv 1808.05517: the best
approximation of each input channel's kernels by a few of them. Fine-tune or distil afterwards.

Shapes: O x C x H x W of the weight, K = H W, R kernels for each input channel.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from noctule.compress.factor.factored import Factored, check_plain, check_ranks, steps_of
from noctule.core.convert import Leave


@dataclass(frozen=True, kw_only=True)
class ToSeparable:
    """`nn.Conv2d` -> a depthwise convolution and a 1x1 one, wherever that has fewer numbers.

    What it loses of each weight is in the conversion's text, and in ``lost`` of the new layer.

    Args:
        rank: kernels for each input channel (R); 1 in MobileNets.
        most_lost: leave a convolution of which a larger share of the squares would be lost.

    >>> from noctule.core.convert import convert_
    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3))
    >>> print(convert_(model, ToSeparable(rank=2)))
    changed 0: Conv2d -> Factored(8, 16, separable, rank=2, lost=...%)
    """

    rank: int = 1
    most_lost: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 <= self.most_lost <= 1.0:
            raise ValueError(
                f"rank must be at least 1 and most_lost lie in [0, 1], got {self.rank} and {self.most_lost}"
            )

    def __call__(self, module: nn.Module) -> nn.Module | None:
        """The two convolutions, or None for another kind of module."""
        if not check_plain(module, nn.Conv2d):
            return None
        assert isinstance(module, nn.Conv2d)
        rows, columns, high, wide = module.weight.shape
        numbers = columns * self.rank * (high * wide + rows)
        if numbers >= module.weight.numel():
            raise Leave(f"{numbers:,} numbers would be no fewer than its {module.weight.numel():,}")
        new = separable(module, self.rank)
        if new.lost > self.most_lost:
            raise Leave(f"{new.lost:.1%} of its squares would be lost, more than {self.most_lost:.1%}")
        return new


def separable(layer: nn.Conv2d, rank: int) -> Factored:
    """A depthwise convolution of ``rank`` kernels for each input channel, and a 1x1 one: the best such approximation.

    Raises:
        ValueError: the rank does not lie from 1 to the smaller of O and H W, or the convolution has groups.
    """
    rows, columns, high, wide = layer.weight.shape
    check_ranks(layer, (rank, min(rows, high * wide)))
    w_COK = layer.weight.detach().cpu().double().flatten(2).transpose(0, 1)
    mixed_COR, sizes_CR, kernels_CRK = torch.linalg.svd(w_COK, full_matrices=False)
    mixed_COR = mixed_COR[:, :, :rank] * sizes_CR[:, None, :rank]
    depthwise = kernels_CRK[:, :rank].reshape(columns * rank, 1, high, wide)
    pointwise = mixed_COR.transpose(0, 1).reshape(rows, columns * rank, 1, 1)
    parts = {"depthwise": (depthwise, {"groups": columns, **steps_of(layer)}), "pointwise": (pointwise, {})}
    return Factored(layer, parts, about=f"separable, rank={rank}", product=partial(_product, rank=rank))


def _product(depthwise: Tensor, pointwise: Tensor, *, rank: int) -> Tensor:
    mixed_OCR = pointwise.view(len(pointwise), -1, rank)
    return torch.einsum("ocr,crhw->ochw", mixed_OCR, depthwise.view(-1, rank, *depthwise.shape[2:]))
