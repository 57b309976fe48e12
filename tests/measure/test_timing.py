import gc
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from noctule.measure import Timing, interleave, ratio

seconds = st.floats(1e-6, 10)


def test_functions_take_turns_and_the_warmup_is_not_timed():
    calls = []
    timings = interleave({name: lambda name=name: calls.append(name) for name in "ABC"}, rounds=4, warmup=2)
    assert "".join(calls) == "ABC" * 6
    assert list(timings) == ["A", "B", "C"]
    assert all(len(timing.samples) == 4 for timing in timings.values())


def test_each_call_takes_the_time_between_two_looks_at_the_clock(monkeypatch):
    now = 0

    def passing(nanoseconds):
        nonlocal now
        now += nanoseconds

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now)
    timings = interleave({"long": lambda: passing(20), "short": lambda: passing(2)}, rounds=7, warmup=0)
    assert timings["long"].samples == (20e-9,) * 7
    assert timings["short"].minimum == 2e-9
    assert ratio(timings["long"], timings["short"]).value == pytest.approx(10)


def test_garbage_is_not_collected_meanwhile_and_is_afterwards():
    states = []
    interleave({"a": lambda: states.append(gc.isenabled())}, rounds=2, warmup=1)
    assert states == [True, False, False]
    assert gc.isenabled()

    def fail():
        if not gc.isenabled():
            raise KeyError

    with pytest.raises(KeyError):
        interleave({"a": fail})
    assert gc.isenabled()


@pytest.mark.parametrize("options", [{"rounds": 0}, {"warmup": -1}, {"functions": {}}])
def test_nothing_to_time_is_an_error(options):
    with pytest.raises(ValueError, match="nothing to time"):
        interleave(**{"functions": {"a": int}, **options})


@given(st.lists(seconds, min_size=1, max_size=30))
def test_a_timing_is_in_order(samples):
    timing = Timing(tuple(samples))
    first, third = timing.quartiles
    assert timing.minimum <= first <= timing.median_seconds <= third <= max(samples)
    assert timing.as_dict()["rounds"] == len(samples)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=30), st.sampled_from([0.25, 2.0, 8.0]))
def test_laws_of_ratios(pairs, factor):
    a, b = (Timing(tuple(samples)) for samples in zip(*pairs, strict=True))
    there, back = ratio(a, b), ratio(b, a)
    assert there.low <= there.value <= there.high
    assert back.low == pytest.approx(1 / there.high)
    assert back.high == pytest.approx(1 / there.low)
    assert ratio(a, a).low == ratio(a, a).high == 1
    assert ratio(Timing(tuple(factor * x for x in a.samples)), b).value == pytest.approx(factor * there.value)


# The ranks that make a 95 % interval of a median, from printed tables of the sign test.
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (50, 18), (100, 40)])
def test_the_interval_is_that_of_the_tables(n, rank):
    found = ratio(Timing(tuple(float(i) for i in range(1, n + 1))), Timing((1.0,) * n))
    assert (found.low, found.high) == (rank, n + 1 - rank)
    assert (found.coverage >= 0.95) == (n >= 6)
    assert str(found).startswith(f"{found.value:.3g} [")


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        found = ratio(Timing(tuple(generator.lognormal(size=21))), Timing((1.0,) * 21))
        hits += found.low <= 1 <= found.high
    assert abs(hits / 1000 - found.coverage) < 0.02


def test_timings_that_are_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="no pairs"):
        ratio(Timing((1.0, 2.0)), Timing((1.0,)))
