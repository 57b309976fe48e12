"""Graphs of workers for decentralized averaging, as plain functions, and the mixing weights of their edges.

A graph gives the neighbours of each worker in one meeting; all workers work it out alike. Shapes: W workers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from noctule.core.random import generator

Neighbours = list[tuple[int, ...]]
"""The neighbours of each worker, by rank; the relation is symmetric."""
Graph = Callable[[int, int], Neighbours]
"""(W, number of the meeting) -> neighbours."""


def ring(world: int, meeting: int = 0) -> Neighbours:
    """A ring: each worker has the one before and the one after as neighbours.

    >>> ring(4)
    [(1, 3), (0, 2), (1, 3), (0, 2)]
    """
    return _joined(world, [(rank, (rank + 1) % world) for rank in range(world)])


def torus(world: int, meeting: int = 0) -> Neighbours:
    """A torus: each worker has the four round it on a rectangle, as square as W allows, whose opposite sides are joined.

    >>> torus(6)[0]
    (1, 2, 3)
    """
    rows = next(rows for rows in range(math.isqrt(world), 0, -1) if world % rows == 0)
    columns = world // rows
    right = [(rank, rank - rank % columns + (rank + 1) % columns) for rank in range(world)]
    return _joined(world, [*right, *((rank, (rank + columns) % world) for rank in range(world))])


def random(world: int, meeting: int = 0) -> Neighbours:
    """A ring in an order that is drawn anew for each meeting: a change reaches all workers in about log W meetings.

    >>> random(9, 0) == random(9, 0), random(9, 0) == random(9, 1)
    (True, False)
    """
    order = torch.randperm(world, generator=generator("graph", meeting)).tolist()
    return _joined(world, [(order[at], order[(at + 1) % world]) for at in range(world)])


def complete(world: int, meeting: int = 0) -> Neighbours:
    """The complete graph: a meeting is the plain mean.

    >>> complete(3)
    [(1, 2), (0, 2), (0, 1)]
    """
    return _joined(world, [(a, b) for a in range(world) for b in range(a)])


def weights(neighbours: Sequence[Sequence[int]]) -> Tensor:
    """Metropolis weights (W, W), symmetric, with rows and columns that add up to one (Xiao and Boyd 2004).

    A pair of neighbours has 1 / (1 + the larger of both degrees).

    Raises:
        ValueError: a worker is its own neighbour, is a neighbour in one direction only, or is listed twice.

    >>> weights(complete(4))[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    world = len(neighbours)
    found = torch.zeros(world, world, dtype=torch.float64)
    for rank, others in enumerate(neighbours):
        for other in others:
            if not 0 <= other < world or other == rank or rank not in neighbours[other] or others.count(other) > 1:
                raise ValueError(
                    f"of {world} workers {rank} has the neighbours {tuple(others)}: each must be another worker, listed once, and "
                    "have it as a neighbour too"
                )
            found[rank, other] = 1.0 / (1 + max(len(others), len(neighbours[other])))
    return found + torch.diag(1.0 - found.sum(1))


def _joined(world: int, pairs: Sequence[tuple[int, int]]) -> Neighbours:
    sets: list[set[int]] = [set() for _ in range(world)]
    for a, b in pairs:
        if a != b:
            sets[a].add(b)
            sets[b].add(a)
    return [tuple(sorted(each)) for each in sets]
