"""A step that is skipped, or an exchange that fails, leaves what everyone owes as it was: nothing is lost, nothing sent twice."""

import pytest
import torch
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from exchange_cases import KEYS, Half, given, together
from noctule.codecs import Cast, NaturalCompression, TopK
from noctule.core.aggregate import median
from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import attach
from noctule.exchange import Compress, EverySync, PowerSGD, Weigh

CODECS = [Half(), TopK(0.3), Cast(torch.bfloat16), NaturalCompression()]


def spoilt(rank, call, *, key, value):
    """What is given, with one number that is not finite."""
    tensors = given(rank, call)
    tensors[key].view(-1)[0] = value  # which every codec here sends
    return tensors


def same(a, b):
    """Of states: the same tensors, bit for bit, and nothing else."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Failing:
    """A path on which some calls do not come about."""

    def __init__(self, path, fails):
        self.path, self.fails, self.calls = path, fails, 0
        self.rank, self.world = path.rank, path.world

    def share(self, message):
        return self.path.share(message)

    def __call__(self, *args):
        self.calls += 1
        if self.calls - 1 in self.fails:
            self.path.share(b"so that nobody is still at an earlier call")
            raise LostWorkerError("gone")
        return self.path(*args)


@settings(max_examples=40, deadline=None)
@given_(
    st.integers(1, 4), st.sets(st.integers(0, 4), max_size=3), st.sampled_from([0, 1, 2, 4]), st.sampled_from(CODECS),
    st.sampled_from([torch.inf, -torch.inf, torch.nan]),
)  # fmt: skip
def test_over_a_skipped_step_debts_stay_and_nothing_is_lost(world, skipped, key, codec, value):
    def work(path):
        compress = Compress(codec, error_feedback=True)
        channel, got = Channel(Weigh(1.0), compress, path=path), []
        for call in range(5):
            before = dict(compress.owed)
            if call in skipped and path.rank == world - 1:
                totals = channel(spoilt(path.rank, call, key=key, value=value), KEYS)
            else:
                totals = channel(given(path.rank, call), KEYS)
            if call in skipped:
                assert not all(bool(x.isfinite().all()) for x in totals)
                assert same(compress.owed, before)
            else:
                got.append(totals)
        return got, compress.owed

    found = together(world, work)
    taken = [call for call in range(5) if call not in skipped]
    for at, name in enumerate(KEYS):
        sent = sum(given(rank, call)[at].double() for rank in range(world) for call in taken)
        owed = sum(owed[name].double() for _, owed in found)
        delivered = sum(got[at].double() for got in found[0][0]) * world
        torch.testing.assert_close(delivered + owed, sent, atol=5e-5, rtol=1e-5)


def test_a_sum_that_overflows_is_no_delivery_either():
    def work(path):
        compress = Compress(Half())
        channel = Channel(compress, path=path)
        channel([torch.ones(4), torch.ones(2)], ["x", "y"])
        before = dict(compress.owed)
        x, _ = channel([torch.full((4,), 3e38), torch.ones(2)], ["x", "y"])
        assert not x.isfinite().all()
        return same(compress.owed, before)

    assert together(2, work) == [True, True]


def test_a_worker_that_an_aggregate_leaves_out_owes_what_it_owed():
    def work(path):
        compress = Compress(Half())
        channel = Channel(compress, path=path, aggregate=median)
        channel([torch.ones(4), torch.ones(2)], ["x", "y"])
        bad = torch.full((4,), torch.nan if path.rank == 2 else 5.0)
        x, _ = channel([bad, torch.full((2,), 5.0)], ["x", "y"])
        assert x.isfinite().all()
        return compress.owed["x"].tolist(), compress.owed["y"].tolist()

    taken = [0.0, 0.0, 6.0, 6.0], [0.0, 6.0]
    assert together(3, work) == [taken, taken, ([0.0, 0.0, 1.0, 1.0], [0.0, 6.0])]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_an_exchange_that_fails_and_is_repeated_is_one_that_did_not_fail(codec):
    def work(path):
        def results(fails):
            compress = Compress(codec, error_feedback=True)
            channel, got = Channel(Weigh(path.rank + 1), compress, path=Failing(path, fails)), []
            for call in range(3):
                before = channel.state_dict()
                if channel.path.calls in fails:
                    with pytest.raises(LostWorkerError):
                        channel(given(path.rank, call), KEYS)
                    assert same(channel.state_dict(), before)
                got.append(channel(given(path.rank, call), KEYS))
            return [got, channel.state_dict()]

        return same(results({1}), results(set()))

    assert all(together(2, work))


MATRICES = ["w", "bias", "v"]


def gradients(rank, call=0):
    generator = torch.Generator().manual_seed(10 * call + rank)
    return [torch.randn(shape, generator=generator) for shape in ((20, 30), (30,), (9, 8))]


def low_rank(path):
    """Also with an account of its own below, which is as it was too."""
    return PowerSGD(2, inner=Channel(Compress(Half()), path=path))


@pytest.mark.parametrize("first", [True, False], ids=["the first step", "a later step"])
@pytest.mark.parametrize("spoils", [0, 1, 2])
def test_a_skipped_step_of_low_rank_changes_nothing(first, spoils):
    def work(path):
        power = low_rank(path)
        if not first:
            power(gradients(path.rank), MATRICES)
        before = power.state_dict()
        bad = gradients(path.rank, 1)
        if path.rank:
            bad[spoils].view(-1)[3] = torch.inf
        totals = power(bad, MATRICES)
        assert not all(bool(x.isfinite().all()) for x in totals)
        return same(power.state_dict(), before)

    assert together(2, work) == [True, True]


@pytest.mark.parametrize("fails", [{2}, {3}])
def test_low_rank_that_fails_in_either_exchange_and_is_repeated(fails):
    def work(path):
        def results(fails):
            power, got = low_rank(Failing(path, fails)), []
            for call in range(3):
                if fails and call == 1:
                    before = power.state_dict()
                    with pytest.raises(LostWorkerError):
                        power(gradients(path.rank, call), MATRICES)
                    assert same(power.state_dict(), before)
                got.append(power(gradients(path.rank, call), MATRICES))
            return [got, power.state_dict()]

        return same(results(fails), results(set()))

    assert all(together(2, work))


def test_training_over_a_skipped_step_is_training_without_that_batch():
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(6, 5, generator=generator), torch.randn(6, 2, generator=generator)) for _ in range(6)]

    def model_and_optimizer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    made = [[model_and_optimizer() for _ in range(2)] for _ in range(3)]  # here, since threads share the seed

    def work(path):
        part = slice(2 * path.rank, 2 * path.rank + 2)

        def weights(which, batches, overflow):
            model, optimizer = made[path.rank][which]
            with attach(model, optimizer, EverySync(Channel(Compress(TopK(0.2)), path=path))):
                for x, y in batches:
                    optimizer.zero_grad()
                    loss = (model(x[part]) - y[part]).pow(2).mean()
                    if overflow and x is data[2][0] and path.rank == 1:
                        loss = loss + model[2].bias[0] * torch.inf
                    loss.backward()
                    if all(bool(p.grad.isfinite().all()) for p in model.parameters()):
                        optimizer.step()
            return [p.detach() for p in model.parameters()]

        return same(weights(0, data, True), weights(1, data[:2] + data[3:], False))

    assert all(together(3, work))


@settings(max_examples=60, deadline=None)
@given_(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.sampled_from(CODECS))
def test_whatever_a_worker_counts_it_owes_what_was_not_delivered(weights, codec):
    """A worker that has many samples in one step and few, or none, in the next owes gradients, not gradients times samples."""

    def work(path):
        weigh, compress = Weigh(1.0), Compress(codec, error_feedback=True)
        channel = Channel(weigh, compress, path=path)
        given_sum, got_sum = ([torch.zeros(x.shape, dtype=torch.float64) for x in given(0)] for _ in range(2))
        for call, n in enumerate(weights):
            weigh.n = float(n)
            tensors = given(0, call)
            for x, total, a, b in zip(tensors, channel(tensors, KEYS), given_sum, got_sum, strict=True):
                a += x if n else 0.0
                b += total
        for key, a, b in zip(KEYS, given_sum, got_sum, strict=True):
            torch.testing.assert_close(b + compress.owed.get(key, torch.zeros(())), a, atol=1e-4, rtol=1e-4)

    together(1, work)


def test_debts_are_kept_where_sixteen_bits_could_not_hold_them():
    def work(path):
        compress, x = Compress(TopK(0.5)), torch.tensor([1.0, 0.001], dtype=torch.bfloat16)
        channel, got = Channel(compress, path=path), torch.zeros(2, dtype=torch.float64)
        for _ in range(1000):
            got += channel([x], ["x"])[0].double()
        torch.testing.assert_close(got + compress.owed["x"], 1000.0 * x.double(), atol=0.0, rtol=1e-3)

    together(1, work)


def test_a_worker_without_samples_leaves_its_debts_of_low_rank_as_they_were():
    def work(path):
        weigh = Weigh(1.0)
        power = PowerSGD(1, inner=Channel(weigh, path=path))
        power(given(path.rank), KEYS)
        before = dict(power.owed)
        weigh.n = float(path.rank)
        power(given(path.rank, 1), KEYS)
        return same(before, power.owed)

    assert together(2, work) == [True, False]


def test_low_rank_gives_away_what_its_other_exchange_owes_too():
    def work(path):
        power = PowerSGD(1, inner=Channel(Compress(Half()), path=path))
        power(given(path.rank), KEYS)
        released = power.release()
        assert {"a.weight", "a.bias", "scale"} <= released.keys() <= set(KEYS)
        assert not power.release()

    together(1, work)
