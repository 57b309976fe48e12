"""Draws are a function of the parts of their generator, and of all of them."""

import itertools

import torch

from noctule.core.random import generator


def drawn(*parts: int | str) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=generator(*parts)).tolist())


def test_every_part_counts_and_so_does_their_order():
    parts = list(itertools.product((0, 1, 1_000_003), repeat=3))
    assert len({drawn(*each) for each in parts}) == len(parts)
    assert drawn(0, "a") != drawn(0, "b")
    assert drawn(1, 23) != drawn(12, 3)
    assert drawn(7, "a", 3) == drawn(7, "a", 3)
