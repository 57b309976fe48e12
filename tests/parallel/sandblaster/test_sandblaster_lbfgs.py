"""L-BFGS on slices is torch's, and sums in a fixed tree do not know in which order they came."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.parallel.sandblaster.lbfgs import LBFGS, Minimiser, OrderedSum, Vector

PROBLEMS = {
    "valley": lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
    "waves": lambda x: (x**4).sum() / 10 + torch.sin(3 * x).sum() + x.sum() ** 2,
    "bowl": lambda x: (torch.arange(1.0, len(x) + 1, dtype=x.dtype) ** 2 * (x - 1) ** 2).sum(),
}


def run(minimiser, f, steps, shards):
    """The losses at the beginnings of steps, and how many evaluations they took."""
    losses, evaluations = [], 0
    for _ in range(steps):
        search, found = minimiser.step(), None
        try:
            while True:
                x = search.send(found).whole().requires_grad_()
                (loss := f(x)).backward()
                found, evaluations = (loss.item(), Vector.cut(x.grad, shards)), evaluations + 1
        except StopIteration as end:
            losses.append(end.value)
    return losses, evaluations


@settings(max_examples=60, deadline=None)
@given(
    problem=st.sampled_from(sorted(PROBLEMS)),
    size=st.integers(2, 9),
    shards=st.integers(1, 5),
    steps=st.integers(1, 4),
    strong_wolfe=st.booleans(),
    max_iter=st.integers(1, 12),
    max_eval=st.none() | st.integers(1, 12),
    history_size=st.integers(1, 6),
    lr=st.sampled_from([1.0, 0.3, 1e-3]),
    seed=st.integers(0, 99),
)
def test_every_step_is_that_of_torch(problem, size, shards, steps, strong_wolfe, seed, **options):
    f = PROBLEMS[problem]
    begin = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 2
    if not strong_wolfe:
        options["lr"] = min(options["lr"], 1e-3)  # without a search the valley is left at once
    theirs = begin.clone().requires_grad_()
    oracle = torch.optim.LBFGS([theirs], line_search_fn="strong_wolfe" if strong_wolfe else None, **options)
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        oracle.zero_grad()
        (loss := f(theirs)).backward()
        return loss

    expected = [oracle.step(closure).item() for _ in range(steps)]
    ours = Minimiser(Vector.cut(begin.clone(), shards), LBFGS(strong_wolfe=strong_wolfe, **options))
    losses, used = run(ours, f, steps, shards)
    assert used == evaluations
    assert losses == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert torch.allclose(ours.x.whole(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_it_gets_to_the_bottom_of_the_valley():
    ours = Minimiser(Vector.cut(torch.full((6,), -1.0, dtype=torch.float64), 2), LBFGS(max_iter=100))
    run(ours, PROBLEMS["valley"], 2, 2)
    assert torch.allclose(ours.x.whole(), torch.ones(6, dtype=torch.float64), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(0, 4), shards=st.integers(1, 3))
def test_what_is_kept_between_steps_is_all_there_is(steps, shards):
    def new():
        return Minimiser(Vector.cut(torch.full((5,), -0.5, dtype=torch.float64), shards), LBFGS(max_iter=3))

    whole, first, second = new(), new(), new()
    run(whole, PROBLEMS["waves"], steps + 3, shards)
    run(first, PROBLEMS["waves"], steps, shards)
    second.load_state_dict(first.state_dict(), lambda x: Vector.cut(x, shards))
    run(second, PROBLEMS["waves"], 3, shards)
    assert torch.equal(second.x.whole(), whole.x.whole())


@given(count=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_a_sum_does_not_know_the_order_in_which_it_came(count, seed):
    vectors = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double() ** 9
    sums, most = [], 0
    for order in (range(count), random.Random(seed).sample(range(count), count)):
        total = OrderedSum(count)
        for n, place in enumerate(order):
            assert total.total is None, f"complete after {n} of {count}"
            total.add(place, Vector([vectors[place].clone()]))
            most = max(most, len(total._halves)) if order == range(count) else most
        assert total.total is not None
        sums.append(total.total.whole())
    assert torch.equal(*sums)
    assert torch.allclose(sums[0], vectors.sum(0))
    assert most <= count.bit_length()


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"max_iter": 0}, {"history_size": 0}, {"max_eval": 0}])
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="got LBFGS"):
        LBFGS(**wrong)
