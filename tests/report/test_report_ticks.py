"""Axis numbers are round, even, few and tell themselves apart; thinning keeps what the eye would notice."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import law

from noctule.report.ticks import labels, thin, ticks

NUMBERS = st.floats(-1e100, 1e100)


@law
@given(NUMBERS, NUMBERS, st.integers(3, 12), st.booleans())
def test_ticks_are_few_even_round_and_reach_from_end_to_end(a, b, most, whole):
    low, high = sorted((a, b))
    found = ticks(low, high, most=most, whole=whole)
    step = found[1] - found[0]
    assert 2 <= len(found) <= most
    assert all(y > x for x, y in itertools.pairwise(found))
    slack = 1e-6 * step + 1e-9 * max(abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert found[-1] - found[0] <= most * step
    if high - low > 1e-6 * max(abs(low), abs(high), 1e-80):
        leading = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(leading - nice) for nice in (1, 2, 5)) < 1e-3
    if whole:
        assert all(tick == int(tick) for tick in found)


@law
@given(NUMBERS, NUMBERS, st.integers(3, 12), st.booleans())
def test_labels_tell_ticks_apart_and_say_their_value(a, b, most, whole):
    found = ticks(*sorted((a, b)), most=most, whole=whole)
    texts = labels(found)
    assert len(set(texts)) == len(texts) == len(found)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}
    for value, text in zip(found, texts, strict=True):
        number = float(text.rstrip("kMG").replace(",", "")) * scale.get(text[-1], 1)
        assert number == pytest.approx(value, rel=1e-6, abs=(found[1] - found[0]) / 2)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.713, 0.888, ["0.70", "0.75", "0.80", "0.85", "0.90"]),
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 12_500, ["0", "5k", "10k", "15k"]),
        (0, 3000, ["0", "1,000", "2,000", "3,000"]),
        (-2, 2, ["-2", "-1", "0", "1", "2"]),
        (0, 2.4e6, ["0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M"]),
    ],
)
def test_some_axes_checked_by_eye(low, high, texts):
    assert labels(ticks(low, high)) == texts


@pytest.mark.parametrize("ends", [(1, 0), (math.nan, 1), (0, math.inf), (0, 1e300)])
def test_axes_that_cannot_be_are_refused(ends):
    with pytest.raises(ValueError, match="axis"):
        ticks(*ends)


@law
@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=300), st.integers(6, 80))
def test_thinning_keeps_order_ends_and_extremes(values, most):
    points = list(enumerate(values))
    kept = thin(points, most)
    assert len(kept) <= most
    assert kept == [point for point in points if point in kept]
    if points:
        assert kept[0] == points[0]
        assert kept[-1] == points[-1]
    known = [y for y in values if y is not None]
    if known:
        seen = [y for _, y in kept if y is not None]
        assert (min(seen), max(seen)) == (min(known), max(known))


def test_a_long_gap_stays_a_gap():
    points = [(x, None if 400 <= x < 600 else 1.0) for x in range(1000)]
    kept = thin(points, 100)
    assert any(y is None for _, y in kept)
    assert all(400 <= x < 600 for x, y in kept if y is None)
