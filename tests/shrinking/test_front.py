"""The front is the set of undominated points, and the choice meets what is asked."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noctule.core.errors import UsageError
from noctule.shrinking import Bound, Candidate, choose, front
from noctule.shrinking.candidates import hopeless
from noctule.shrinking.front import nearest


@dataclass(frozen=True)
class Measured:
    bytes: int
    latency_ms: float
    accuracy: float


few = st.integers(1, 6)
POINTS = st.lists(st.builds(Measured, few, few.map(float), few.map(lambda n: n / 6)), min_size=1, max_size=12)
SOURCE = Measured(6, 6.0, 1.0)


@given(st.lists(st.tuples(few, few, few), max_size=12))
def test_the_front_is_the_set_of_undominated_points(costs):
    def dominates(a, b):
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    found = front(costs)
    for at, mine in enumerate(costs):
        assert (at in found) == (not any(dominates(other, mine) for other in costs))


@given(POINTS, few, few, few)
def test_the_choice_meets_its_bounds_and_no_smaller_one_is_as_accurate(points, size, ms, share):
    bounds = [Bound("bytes", size), Bound("latency_ms", 6 / ms, times=True), Bound("accuracy", share / 6)]
    met = [p for p in points if p.bytes <= size and p.latency_ms <= ms + 1e-12 and p.accuracy >= share / 6]
    chosen = choose(points, bounds, SOURCE, within=20.0)
    assert (chosen is None) == (not met)
    if chosen is not None:
        assert chosen in met
        close = [p for p in met if p.accuracy >= 0.8]
        best = min(p.bytes for p in close) if close else max(p.accuracy for p in met)
        assert (chosen.bytes if close else chosen.accuracy) == best
    assert nearest(points, bounds, SOURCE)[0] in (met or points)


@pytest.mark.parametrize(
    "text", ["bytes", "bytes=x", "byte=10x", "bytes=-1", "latency=3", "latency_ms=3x", "accuracy=90", "bytes=nan"]
)
def test_a_target_that_is_none_is_refused_with_the_forms_that_are(text):
    with pytest.raises(UsageError, match=r"say .*(bytes=10x|latency=3x|latency_ms=0.5|accuracy=0.9)"):
        Bound.read(text)


def test_a_training_ends_early_only_where_every_precision_is_beaten_in_all():
    done = [Candidate(name="half", precision="int8", file="f", bytes=10, latency_ms=1.0, accuracy=0.9)]
    large = Candidate(name="a", precision="float32", bytes=20, latency_ms=2.0)
    small, quick = (Candidate(name="b", precision="int8", bytes=b, latency_ms=ms) for b, ms in ((9, 2.0), (20, 0.5)))
    reasons = hopeless([large], done, margin=2.0)
    assert "half" in reasons(0.85)[0]
    assert not reasons(0.89)  # within what training may bring
    assert not hopeless([large, small], done, margin=2.0)(0.1)
    assert not hopeless([large, quick], done, margin=2.0)(0.1)
    assert not hopeless([large], [], margin=2.0)(0.1)
