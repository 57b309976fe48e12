"""One budget for several layers: no other choice within it does less harm."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.compress.budget import UNITS, least_harm

OPTION = st.tuples(st.integers(1, 40), st.floats(0.0, 9.0))


@given(st.lists(st.lists(OPTION, min_size=1, max_size=4), max_size=4), st.integers(0, 160))
@settings(max_examples=150, deadline=None)
def test_no_other_choice_that_fits_does_less_harm(options, budget):
    fitting = [
        sum(harm for _, harm in chosen)
        for chosen in itertools.product(*options)
        if sum(size for size, _ in chosen) <= budget
    ]
    if not fitting:
        with pytest.raises(ValueError, match="smallest choices take"):
            least_harm(options, budget)
        return
    taken = [own[k] for own, k in zip(options, least_harm(options, budget), strict=True)]
    assert sum(size for size, _ in taken) <= budget
    assert sum(harm for _, harm in taken) == pytest.approx(min(fitting))


def test_a_large_budget_is_told_apart_in_parts_and_never_exceeded():
    size = 1000 * UNITS + 1
    assert least_harm([[(size, 0.0), (1, 1.0)]] * 2, 2 * size + 4000) == [0, 0]
    assert 0 in least_harm([[(size, 0.0), (1, 1.0)]] * 2, 2 * size - 1)
    assert least_harm([[(size, 0.0), (1, 1.0)]] * 2, 2 * size - 1) != [0, 0]
