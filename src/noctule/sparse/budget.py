"""How many of the allowed weights each layer gets."""

from collections.abc import Callable, Sequence
from math import prod

Shape = tuple[int, ...]
Budget = Callable[[Sequence[Shape], int], list[int]]
"""Shapes of the layers' weights, (O, I) or (O, C, KH, KW), and the total number of weights -> weights of each layer."""


def check_density(density: float) -> None:
    """Refuse what is no share of the places."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}")


def check_said_once(**ways: object) -> None:
    """Refuse none or several of the ways to say how sparse something is, of which one is needed."""
    given = [f"{name}=" for name, value in ways.items() if value is not None]
    if len(given) != 1:
        *names, last = (f"{name}=" for name in ways)
        raise ValueError(
            f"say how sparse it is by one of {', '.join(names)} or {last}, got {' and '.join(given) or 'none'}"
        )


def weights_at(density: float, shape: Shape) -> int:
    """How many weights a layer of this shape and density has: at least one where it has places."""
    check_density(density)
    return max(1, round(density * prod(shape))) if prod(shape) else 0


def uniform(shapes: Sequence[Shape], weights: int) -> list[int]:
    """The same density everywhere.

    >>> uniform([(10, 10), (10, 30)], 40)
    [10, 30]
    """
    return _share(shapes, weights, [float(prod(shape)) for shape in shapes])


def erdos_renyi(shapes: Sequence[Shape], weights: int) -> list[int]:
    """In proportion to O + I: small layers get denser, and full ones pass the rest on (Mocanu et al. 2018, arXiv 1707.04780).

    Kernels count with all their sides, O + C + KH + KW (Evci et al. 2020, arXiv 1911.11134).

    >>> erdos_renyi([(1000, 784), (1000, 1000), (1000, 1000), (10, 1000)], 125_685)
    [35681, 40002, 40002, 10000]
    """
    return _share(shapes, weights, [float(sum(shape)) for shape in shapes])


def _share(shapes: Sequence[Shape], weights: int, claims: list[float]) -> list[int]:
    """Shares in proportion to the claims, none above its places, which add up to ``weights``; a layer with places gets one."""
    places = [prod(shape) for shape in shapes]
    if not 0 <= weights <= sum(places):
        raise ValueError(f"{weights} weights do not fit into the {sum(places)} places of layers {list(shapes)}")
    if weights < sum(p > 0 for p in places):
        raise ValueError(
            f"{weights} weights are fewer than the {len(places)} layers {list(shapes)}: give each at least one"
        )
    shares = [0] * len(places)
    open_layers = {k for k, p in enumerate(places) if p}
    left = weights
    while open_layers:
        total = sum(claims[k] for k in open_layers)
        full = {k for k in open_layers if left * claims[k] / total >= places[k]}
        if not full:
            break
        for k in full:
            shares[k] = places[k]
            left -= places[k]
        open_layers -= full
    if open_layers:
        total = sum(claims[k] for k in open_layers)
        exact = {k: left * claims[k] / total for k in open_layers}
        for k in open_layers:
            shares[k] = max(1, int(exact[k]))
        rest = weights - sum(shares)
        by_remainder = sorted(open_layers, key=lambda k: (int(exact[k]) - exact[k], k))
        while rest:
            for k in by_remainder:
                step = (rest > 0) - (rest < 0)
                if step and 1 <= shares[k] + step <= places[k]:
                    shares[k] += step
                    rest -= step
    return shares
