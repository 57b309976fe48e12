import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noctule.core.schedule import constant, cosine, cubic, exponential, linear, step_decay, warmup

RAMPS = [linear, cosine, cubic]
number = st.floats(-1e6, 1e6, allow_nan=False)
positive = st.floats(1e-6, 1e6, allow_nan=False)
length = st.integers(1, 300)


def assert_monotone(values: list[float], start: float, end: float) -> None:
    pairs = list(itertools.pairwise(values))
    slack = 1e-12 * max(abs(start), abs(end))
    assert all(a <= b + slack for a, b in pairs) if start <= end else all(a >= b - slack for a, b in pairs)
    assert all(min(start, end) <= value <= max(start, end) for value in values)


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=number, end=number, steps=length)
def test_a_ramp_goes_from_start_to_end_monotonically_and_stays(ramp, start, end, steps):
    schedule = ramp(start, end=end, steps=steps)
    assert schedule(0) == pytest.approx(start, abs=0)
    assert schedule(steps) == schedule(steps + 1) == schedule(10**9) == end
    assert_monotone([schedule(step) for step in range(steps + 2)], start, end)


@given(start=positive, end=positive, steps=length)
def test_exponential_multiplies_by_the_same_factor(start, end, steps):
    schedule = exponential(start, end=end, steps=steps)
    values = [schedule(step) for step in range(steps + 2)]
    assert values[0] == start
    assert values[steps] == values[-1] == end
    assert_monotone(values, start, end)
    factors = [b / a for a, b in itertools.pairwise(values[: steps + 1])]
    assert factors == pytest.approx([factors[0]] * steps, rel=1e-9)


def test_values_by_hand():
    assert [linear(0.0, end=1.0, steps=4)(s) for s in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine(1.0, end=0.0, steps=4)(1) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert cosine(0.3, end=0.1, steps=10)(5) == pytest.approx(0.2)
    assert [cubic(0.0, end=0.8, steps=2)(s) for s in (0, 1, 2)] == pytest.approx([0.0, 0.7, 0.8])
    assert exponential(1.0, end=0.01, steps=2)(1) == pytest.approx(0.1)
    assert [step_decay(8.0, factor=0.5, every=2)(s) for s in range(6)] == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0]
    assert constant(3)(0) == constant(3)(10**12) == 3.0


@given(first=number, steps=length)
def test_warmup_rises_from_nothing_then_leaves_the_schedule_as_it_was(first, steps):
    schedule = linear(first, end=0.0, steps=7)
    warmed = warmup(schedule, steps=steps)
    assert warmed(0) == 0.0
    assert_monotone([warmed(step) for step in range(steps)], 0.0, first)
    assert [warmed(steps + step) for step in range(9)] == [schedule(step) for step in range(9)]


def test_schedules_are_pure():
    for schedule in (constant(1), cosine(1, end=0, steps=9), warmup(step_decay(1, factor=0.5, every=2), steps=3)):
        forwards = [schedule(step) for step in range(20)]
        assert [schedule(step) for step in reversed(range(20))] == forwards[::-1]
        assert all(isinstance(value, float) for value in forwards)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(math.nan), "value must be a finite number, got nan"),
        (lambda: linear(math.inf, end=0, steps=1), "start must be a finite number"),
        (lambda: cosine(0, end=math.nan, steps=1), "end must be a finite number"),
        (lambda: linear(-1e308, end=1e308, steps=1), "end - start must be a finite number"),
        (lambda: cubic(0, end=1, steps=0), "steps must be at least 1, got 0"),
        (lambda: cosine(0, end=1, steps=2.5), "steps must be a whole number, got 2.5"),
        (lambda: exponential(0, end=1, steps=3), "above 0, got 0.0 and 1.0; use linear or cosine"),
        (lambda: step_decay(1, factor=0, every=3), r"factor in \(0, 1\], got 0.0"),
        (lambda: step_decay(1, factor=1.5, every=3), r"factor in \(0, 1\], got 1.5"),
        (lambda: step_decay(1, factor=0.5, every=0), "every must be at least 1"),
        (lambda: warmup(constant(1), steps=0), "steps must be at least 1"),
        (lambda: linear(0, end=1, steps=5)(-1), "step must be at least 0, got -1"),
        (lambda: constant(1)(-1), "step must be at least 0, got -1"),
        (lambda: warmup(constant(1), steps=3)(-1), "step must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
