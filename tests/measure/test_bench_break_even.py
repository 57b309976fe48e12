import pytest
from hypothesis import given
from hypothesis import strategies as st

from noctule.measure.break_even import break_even


@given(st.floats(0.02, 0.8), st.floats(0.3, 3.0))
def test_a_power_law_is_met_exactly(where, power):
    speedups = {density: (where / density) ** power for density in (0.01, 0.03, 0.2, 0.9)}
    density, how = break_even(speedups)
    assert density == pytest.approx(where, abs=2e-6)
    assert how == "interpolated"


def test_the_first_crossing_counts_and_the_order_does_not():
    assert break_even({0.5: 2.0, 0.1: 0.5, 0.01: 2.0}) == break_even({0.01: 2.0, 0.1: 0.5, 0.5: 2.0})
    density, _ = break_even({0.5: 2.0, 0.1: 0.5, 0.01: 2.0})
    assert density is not None
    assert 0.01 < density < 0.1


def test_who_wins_everywhere_is_said():
    assert break_even({0.01: 0.9, 0.5: 0.1})[0] is None
    assert break_even({0.01: 9.0, 0.5: 1.1})[0] == 0.5
    assert break_even({}) == (None, "dense is faster at every density measured")
