"""Layers of low rank: two linear layers for one, three convolutions for one.

Linear layers by the singular value decomposition; convolutions by Tucker-2: Kim, Park, Yoo, Choi, Yang, Shin 2016, "Compression of
Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications", arXiv 1511.06530. Differs from the paper: ranks
follow from the energy they keep or from one budget for all layers, not from variational Bayesian matrix factorisation.

Shapes: O rows and I columns of a linear weight; O x C x H x W of a convolution's; R ranks.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noctule.compress.factor.factored import Factored, check_plain, conv_like, linear_like, lost_share, steps_of
from noctule.core.convert import Leave, Rule

Ranks = tuple[int, ...]
"""(R,) of a matrix, (R into the core, R out of it) of a convolution."""
Point = tuple[int, float, Ranks | None]
"""Numbers stored, share of the squares lost, and the ranks; None is the layer as it is."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """`nn.Linear` -> two of them, `nn.Conv2d` -> 1x1, core, 1x1, wherever that has fewer numbers.

    Fine-tune afterwards. A convolution of 1x1 is taken as a matrix.

    Args:
        energy: share of the squared singular values that each layer keeps, in (0, 1]; of convolutions on each of the two sides.
            Give this or ``parameters``.
        parameters: numbers that the weights of all these layers hold together afterwards, shared out by the least energy lost for
            each number saved; biases come on top.

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
        options: dict[nn.Module, _Options] = {}
        ranks: dict[nn.Module, Ranks | None]
        for module in modules.values():
            try:
                if check_plain(module, nn.Linear, nn.Conv2d):
                    options[module] = _Options.of(module)
            except Leave as reason:
                reasons[module] = reason
        if self.parameters is not None:
            ranks = _by_budget(options, self.parameters)
        else:
            ranks = {module: own.at(1.0 - (self.energy or 1.0))[2] for module, own in options.items()}

        def rule(module: nn.Module) -> nn.Module | None:
            if module in reasons:
                raise reasons[module]
            if module not in options:
                if check_plain(module, nn.Linear, nn.Conv2d):
                    raise Leave("its weight is tied")
                return None
            if (chosen := ranks[module]) is None:
                what = f"{self.energy:.1%} of its energy" if self.energy is not None else "its part of the budget"
                raise Leave(f"{what} takes ranks at which it would have no fewer numbers")
            layer: Any = module
            return tucker2(layer, *chosen) if len(chosen) == 2 else low_rank(layer, *chosen)

        return rule


def low_rank(layer: nn.Linear | nn.Conv2d, rank: int) -> Factored:
    """The best two layers in the place of a linear layer or a 1x1 convolution, of ``rank`` (R) features between them.

    Both have the same share in the scale of their product, so that weight decay and learning rates act alike on them.

    Raises:
        ValueError: the rank does not lie from 1 to the smaller width, or the kernel is larger than 1x1.
    """
    if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        raise ValueError(f"a kernel of {layer.kernel_size} is no matrix: use tucker2")
    w_OI = _double(layer.weight).flatten(1)
    _check_rank(rank, min(w_OI.shape))
    if w_OI.shape[1] <= w_OI.shape[0]:
        down_RI = _directions(w_OI.T)[0][:, :rank].T
        up_OR = w_OI @ down_RI.T
        sizes = up_OR.norm(dim=0)
    else:
        up_OR = _directions(w_OI)[0][:, :rank]
        down_RI = up_OR.T @ w_OI
        sizes = down_RI.norm(dim=1)
    is_up = w_OI.shape[1] <= w_OI.shape[0]
    root = torch.where(sizes > 0.0, sizes, 1.0).sqrt()
    up_OR = up_OR / root if is_up else up_OR * root
    down_RI = down_RI * root[:, None] if is_up else down_RI / root[:, None]
    about = f"{w_OI.shape[1]}, {w_OI.shape[0]}, rank={rank}"
    if isinstance(layer, nn.Linear):
        layers = {"down": linear_like(layer, down_RI), "up": linear_like(layer, up_OR, bias=layer.bias)}
        new = Factored(layers, about=about, product=_matrix_product, lost=0.0)
    else:
        down = conv_like(layer, down_RI[:, :, None, None], **steps_of(layer))
        up = conv_like(layer, up_OR[:, :, None, None], bias=layer.bias)
        new = Factored({"down": down, "up": up}, about=about, product=_matrix_product, lost=0.0)
    new.lost = lost_share(layer.weight, new.weight)
    return new.train(layer.training)


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
    if layer.groups > 1:
        raise ValueError(f"tucker2 is for convolutions without groups, this one has {layer.groups}")
    w = _double(layer.weight)
    _check_rank(rank_in, w.shape[1])
    _check_rank(rank_out, w.shape[0])
    into_CR, out_OR = _directions(_by_input(w))[0][:, :rank_in], _directions(w.flatten(1))[0][:, :rank_out]
    for _ in range(iterations):
        out_OR = _directions(torch.einsum("ochw,cr->orhw", w, into_CR).flatten(1))[0][:, :rank_out]
        into_CR = _directions(_by_input(torch.einsum("ochw,or->rchw", w, out_OR)))[0][:, :rank_in]
    core = torch.einsum("ochw,or,cs->rshw", w, out_OR, into_CR)
    layers = {
        "into": conv_like(layer, into_CR.T[:, :, None, None]),
        "core": conv_like(layer, core, **steps_of(layer)),
        "out": conv_like(layer, out_OR[:, :, None, None], bias=layer.bias),
    }
    about = f"{w.shape[1]}, {w.shape[0]}, ranks=({rank_in}, {rank_out})"
    new = Factored(layers, about=about, product=_tucker_product, lost=0.0)
    new.lost = lost_share(layer.weight, new.weight)
    return new.train(layer.training)


@dataclass(frozen=True)
class _Options:
    """What the ranks of one layer would cost."""

    shape: torch.Size
    lost: tuple[list[float], ...]
    """For each side that has a rank, the share of the squares lost at each rank from 0 on."""

    @classmethod
    def of(cls, layer: Any) -> "_Options":
        w = _double(layer.weight)
        if w[0, 0].numel() == 1:
            w_OI = w.flatten(1)
            return cls(w.shape, (_tails(w_OI if len(w_OI) <= w_OI.shape[1] else w_OI.T),))
        return cls(w.shape, (_tails(_by_input(w)), _tails(w.flatten(1))))

    def at(self, level: float) -> Point:
        """The smallest ranks at which no side loses more than ``level``; the layer as it is where these have no fewer numbers."""
        # tails fall, so the first rank under the level is the smallest; rounding is no loss
        ranks = tuple(max(1, bisect_left(lost, -level - 1e-12, key=lambda x: -x)) for lost in self.lost)
        rows, columns = self.shape[:2]
        numbers = ranks[0] * columns + ranks[-1] * rows
        if len(ranks) == 2:
            numbers += ranks[0] * ranks[1] * self.shape[2:].numel()
        if numbers >= self.shape.numel():
            return self.shape.numel(), 0.0, None
        return numbers, sum(lost[rank] for lost, rank in zip(self.lost, ranks, strict=True)), ranks

    def points(self) -> list[Point]:
        """All that the layer can be, from most numbers to fewest."""
        whole: Point = (self.shape.numel(), 0.0, None)
        levels = sorted({0.0, *(x for lost in self.lost for x in lost[1:])}, reverse=True)
        by_numbers = {whole[0]: whole, **{point[0]: point for point in map(self.at, levels)}}
        return sorted(by_numbers.values(), key=lambda point: -point[0])


def _by_budget(options: Mapping[nn.Module, _Options], parameters: int) -> dict[nn.Module, Ranks | None]:
    """Ranks under a total of numbers: always the step next that loses least energy for each number that it saves."""
    points = [own.points() for own in options.values()]
    hulls = [_lower_hull(own) for own in points]
    least = sum(hull[-1][0] for hull in hulls)
    if parameters < least:
        raise ValueError(f"parameters={parameters:,} are too few: the least that these layers can have is {least:,}")
    steps = sorted((_slope(a, b), k, b) for k, hull in enumerate(hulls) for a, b in zip(hull, hull[1:]))
    chosen = [hull[0] for hull in hulls]
    total = sum(point[0] for point in chosen)
    for _, k, point in steps:
        if total <= parameters:
            break
        total -= chosen[k][0] - point[0]
        chosen[k] = point
        if total <= parameters:  # the last step may have gone further than it had to
            chosen[k] = next(p for p in points[k] if p[0] <= point[0] + parameters - total)
    return {module: point[2] for module, point in zip(options, chosen, strict=True)}


def _lower_hull(curve: list[Point]) -> list[Point]:
    """The points below all lines between others, from most numbers to fewest."""
    hull: list[Point] = []
    for point in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])


def _double(weight: Tensor) -> Tensor:
    return weight.detach().cpu().double()


def _by_input(w: Tensor) -> Tensor:
    return w.transpose(0, 1).flatten(1)


def _directions(w_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors as columns (M, M) and squared singular values (M,), the largest first."""
    squares, vectors = torch.linalg.eigh(w_MN @ w_MN.T)
    return vectors.flip(1), squares.clamp(min=0.0).flip(0)


def _tails(w_MN: Tensor) -> list[float]:
    """For each rank from 0 to M, the share of the squares that it loses."""
    squares = _directions(w_MN)[1]
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return (tails / tails[0] if tails[0] > 0.0 else tails).tolist()


def _check_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"a rank must lie from 1 to {most}, got {rank}")


def _matrix_product(down: Tensor, up: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(*up.shape[:1], *down.shape[1:])


def _tucker_product(into: Tensor, core: Tensor, out: Tensor) -> Tensor:
    return torch.einsum("or,rshw,sc->ochw", out.flatten(1), core, into.flatten(1))
