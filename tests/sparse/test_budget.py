import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.sparse.budget import erdos_renyi, uniform

shapes = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6)
budgets = pytest.mark.parametrize("budget", [uniform, erdos_renyi])


@budgets
@given(shapes, st.floats(0.0, 1.0))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_shares_add_up_and_fit(budget, shapes, density):
    places = [o * i for o, i in shapes]
    least = sum(p > 0 for p in places)
    weights = max(least, round(density * sum(places)))
    shares = budget(shapes, weights)
    assert sum(shares) == weights
    assert all(min(1, p) <= share <= p for share, p in zip(shares, places))


@budgets
@given(shapes)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_ends_all_places_and_one_each(budget, shapes):
    places = [o * i for o, i in shapes]
    assert budget(shapes, sum(places)) == places
    assert budget(shapes, sum(p > 0 for p in places)) == [min(1, p) for p in places]


@given(shapes, st.floats(0.05, 1.0))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_uniform_is_the_same_density_within_one_weight(shapes, density):
    places = [o * i for o, i in shapes]
    weights = round(density * sum(places))
    if weights < sum(p > 0 for p in places):
        return
    exact = [p * weights / max(sum(places), 1) for p in places]
    slack = max(1.0, sum(max(0.0, 1.0 - e) for e, p in zip(exact, places) if p))  # what layers below one weight took
    assert all(abs(share - e) <= slack for share, e in zip(uniform(shapes, weights), exact))


def test_erdos_renyi_gives_small_layers_more_and_passes_the_surplus_on():
    shares = erdos_renyi([(1000, 784), (1000, 1000), (1000, 1000), (10, 1000)], 125_685)
    assert shares == [35_681, 40_002, 40_002, 10_000]
    loose = erdos_renyi([(100, 200), (300, 100)], 700)
    assert loose == [300, 400]


@budgets
def test_order_of_equal_layers_does_not_matter_beyond_the_remainder(budget):
    shares = budget([(30, 30)] * 3, 100)
    assert sorted(shares) == [33, 33, 34]


@budgets
@pytest.mark.parametrize(("weights", "message"), [(-1, "do not fit"), (101, "do not fit"), (1, "at least one")])
def test_what_cannot_be_shared_is_refused(budget, weights, message):
    with pytest.raises(ValueError, match=message):
        budget([(5, 10), (10, 5)], weights)
