"""Layers of low rank: two linear layers for one, three convolutions for one.

Linear layers by the singular value decomposition; convolutions by Tucker-2: Kim, Park, Yoo, Choi, Yang, Shin 2016, "Compression of
Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications", arXiv 1511.06530. Differs from the paper: ranks
follow from the energy they keep or from one budget for all layers, not from variational Bayesian matrix factorisation.

Shapes: O rows and I columns of a linear weight; O x C x H x W of a convolution's; R ranks.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from noctule.compress.budget import least_harm
from noctule.compress.factor.factored import Factored, check_plain, check_ranks, steps_of
from noctule.core.convert import Leave, Rule


@dataclass(frozen=True, kw_only=True)
class Factor:
    """`nn.Linear` -> two of them, `nn.Conv2d` -> 1x1, core, 1x1, wherever that has fewer numbers.

    Fine-tune afterwards. A convolution of 1x1 is taken as a matrix.

    Args:
        energy: share of the squared singular values that each layer keeps, in (0, 1]; of convolutions on each of the two sides.
            Give this or ``parameters``.
        parameters: numbers that the weights of all these layers hold together afterwards, shared out so that the sum of the shares
            of energy lost is least; biases come on top.

    >>> from noctule.core.convert import convert_
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> conversion = convert_(model, Factor(parameters=1000))
    >>> sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)) <= 1000
    True
    """

    energy: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        if (self.energy is None) == (self.parameters is None):
            raise ValueError(f"give energy= or parameters=, got {self.energy} and {self.parameters}")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ValueError(f"energy must lie in (0, 1], got {self.energy}")

    def plan(self, modules: Mapping[str, nn.Module]) -> Rule:
        """Choose the ranks of what can be factored among these modules."""
        reasons: dict[nn.Module, Leave] = {}
        tails: dict[nn.Module, Tails] = {}
        for module in modules.values():
            try:
                if check_plain(module, nn.Linear, nn.Conv2d):
                    tails[module] = _tails(module)
            except Leave as reason:
                reasons[module] = reason
        if self.parameters is not None:
            points = [_points(module, own) for module, own in tails.items()]
            taken = least_harm([[point[:2] for point in own] for own in points], self.parameters)
            chosen = {module: own[k] for module, own, k in zip(tails, points, taken, strict=True)}
        else:
            lost = 1.0 - (self.energy or 1.0)
            chosen = {module: _point(module, own, lost) for module, own in tails.items()}

        def rule(module: nn.Module) -> nn.Module | None:
            if module in reasons:
                raise reasons[module]
            if module not in chosen:
                if check_plain(module, nn.Linear, nn.Conv2d):
                    raise Leave("its weight is tied")
                return None
            if not (ranks := chosen[module].ranks):
                what = f"{self.energy:.1%} of its energy" if self.energy is not None else "its part of the budget"
                raise Leave(f"{what} takes ranks at which it would have no fewer numbers")
            layer: Any = module
            return tucker2(layer, *ranks) if len(ranks) == 2 else low_rank(layer, *ranks)

        return rule


def low_rank(layer: nn.Linear | nn.Conv2d, rank: int) -> Factored:
    """The best two layers in the place of a linear layer or a 1x1 convolution, of ``rank`` (R) features between them.

    Both have the same share in the scale of their product, so that weight decay and learning rates act alike on them.

    Raises:
        ValueError: the rank does not lie from 1 to the smaller width, the kernel is larger than 1x1, or there are groups.
    """
    if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        raise ValueError(f"a kernel of {layer.kernel_size} is no matrix: use tucker2")
    w_OI = _double(layer.weight).flatten(1)
    check_ranks(layer, (rank, min(w_OI.shape)))
    left_OR, sizes_R, right_RI = torch.linalg.svd(w_OI, full_matrices=False)
    roots, ones = sizes_R[:rank].sqrt(), [1] * (layer.weight.dim() - 2)
    # next to a feature of no weight stays one side that is not zero, or neither would learn
    down = (torch.where(roots > 0.0, roots, 1.0)[:, None] * right_RI[:rank]).view(rank, -1, *ones)
    up = (left_OR[:, :rank] * roots).view(-1, rank, *ones)
    parts = {"down": (down, steps_of(layer)), "up": (up, {})}
    return Factored(layer, parts, about=f"rank={rank}", product=_matrix_product)


def tucker2(layer: nn.Conv2d, rank_in: int, rank_out: int, *, iterations: int = 5) -> Factored:
    """A 1x1 convolution to ``rank_in`` channels, one of the kernel to ``rank_out``, and a 1x1 one, in the place of a convolution.

    Args:
        layer: without groups.
        rank_in: from 1 to C.
        rank_out: from 1 to O.
        iterations: of the higher-order orthogonal iteration, after a start from the singular vectors of both sides.

    Raises:
        ValueError: a rank that there cannot be, or a convolution with groups.
    """
    w = _double(layer.weight)
    check_ranks(layer, (rank_in, w.shape[1]), (rank_out, w.shape[0]))
    into_CR, out_OR = _directions(_by_input(w), rank_in), _directions(w.flatten(1), rank_out)
    for _ in range(iterations):
        out_OR = _directions(torch.einsum("ochw,cr->orhw", w, into_CR).flatten(1), rank_out)
        into_CR = _directions(_by_input(torch.einsum("ochw,or->rchw", w, out_OR)), rank_in)
    parts = {
        "into": (into_CR.T[:, :, None, None], {}),
        "core": (torch.einsum("ochw,or,cs->rshw", w, out_OR, into_CR), steps_of(layer)),
        "out": (out_OR[:, :, None, None], {}),
    }
    return Factored(layer, parts, about=f"ranks=({rank_in}, {rank_out})", product=_tucker_product)


Tails = tuple[list[float], ...]
"""For each side of a layer that has a rank, the share of the squares lost at each rank from 0 on."""


class Point(NamedTuple):
    """A choice of ranks for a layer."""

    numbers: int
    lost: float
    ranks: tuple[int, ...] = ()
    """(R,) of a matrix, (R into the core, R out of it) of a convolution; none is the layer as it is."""


def _tails(layer: Any) -> Tails:
    w = _double(layer.weight)
    sides = (w.flatten(1),) if w[0, 0].numel() == 1 else (_by_input(w), w.flatten(1))
    squares = (torch.linalg.svdvals(side).square() for side in sides)
    sums = (torch.cat([s.flip(0).cumsum(0).flip(0), s.new_zeros(1)]) for s in squares)
    return tuple((left / left[0].clamp(min=1e-300)).tolist() for left in sums)


def _point(layer: Any, tails: Tails, level: float) -> Point:
    """The smallest ranks at which no side loses more than ``level``; the layer as it is where these have no fewer numbers."""
    # tails fall, so the first rank under the level is the smallest; rounding is no loss
    ranks = tuple(max(1, bisect_left(lost, -level - 1e-12, key=lambda x: -x)) for lost in tails)
    rows, columns, *kernel = layer.weight.shape
    numbers = ranks[0] * columns + ranks[-1] * rows
    if len(ranks) == 2:
        numbers += ranks[0] * ranks[1] * kernel[0] * kernel[1]
    if numbers >= layer.weight.numel():
        return Point(layer.weight.numel(), 0.0)
    return Point(numbers, sum(lost[rank] for lost, rank in zip(tails, ranks, strict=True)), ranks)


def _points(layer: Any, tails: Tails) -> list[Point]:
    """All choices for a layer, as it is included."""
    levels = sorted({0.0, *(x for lost in tails for x in lost[1:])})
    return [Point(layer.weight.numel(), 0.0), *(_point(layer, tails, level) for level in levels)]


def _double(weight: Tensor) -> Tensor:
    return weight.detach().cpu().double()


def _by_input(w: Tensor) -> Tensor:
    return w.transpose(0, 1).flatten(1)


def _directions(w_MN: Tensor, rank: int) -> Tensor:
    """The first left singular vectors as columns, (M, R)."""
    # of the square matrix, which has M of them even where N is smaller
    return torch.linalg.eigh(w_MN @ w_MN.T).eigenvectors.flip(1)[:, :rank]


def _matrix_product(down: Tensor, up: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(*up.shape[:1], *down.shape[1:])


def _tucker_product(into: Tensor, core: Tensor, out: Tensor) -> Tensor:
    return torch.einsum("or,rshw,sc->ochw", out.flatten(1), core, into.flatten(1))
