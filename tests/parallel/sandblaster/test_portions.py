"""Portions are handed out until each has a result, and added up in one order whichever worker sent them when."""

import random
from collections import deque

import torch
from hypothesis import given
from hypothesis import strategies as st

from noctule.parallel.sandblaster.portions import OrderedSum, Portions


def test_late_portions_go_out_again_and_the_first_result_counts():
    portions = Portions(3, deque([1.0, 1.0, 5.0]))
    assert [portions.take(worker, 0.0) for worker in "abc"] == [0, 1, 2]

    def put(worker, portion, now):
        return portions.put(worker, portion, 0.5, torch.ones(1), now)

    assert put("b", 1, 1.0)
    assert portions.take("b", 1.0) is None  # nothing is late
    assert portions.take("b", 2.0) == 0
    assert put("b", 0, 2.5)
    assert not put("a", 0, 2.6)
    assert portions.take("a", 2.6) == 2  # late since long
    assert portions.take("b", 2.7) is None  # a copy of it has just begun
    assert portions.take("c", 2.8) == 2  # a worker that has it and asks has lost it
    assert portions.total is None
    assert put("a", 2, 3.0)
    assert portions.total == (1.5, torch.tensor([3.0]))


@given(count=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_a_sum_does_not_depend_on_the_order_of_arrival(count, seed):
    vectors = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double() ** 9
    sums, most = [], 0
    for order in (range(count), random.Random(seed).sample(range(count), count)):
        total = OrderedSum(count)
        for n, place in enumerate(order):
            assert total.total is None, f"complete after {n} of {count}"
            total.add(place, vectors[place].clone())
            most = max(most, len(total._partial)) if order == range(count) else most
        assert total.total is not None
        sums.append(total.total)
    assert torch.equal(*sums)
    assert torch.allclose(sums[0], vectors.sum(0))
    assert most <= count.bit_length()
