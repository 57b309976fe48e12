"""A channel's laws: exact without a codec, nothing lost with one, refused where it cannot be."""

import pytest
import torch
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st

from exchange_cases import KEYS, Half, given, together
from noctule.codecs import Cast, NaturalCompression, RandomK, TopK
from noctule.core.aggregate import krum, mean, median, trimmed_mean
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Channel, Stage
from noctule.core.remap import Remap
from noctule.exchange import Clip, Compress, Weigh
from noctule.exchange.message_format import MessageFormat


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_mean_of_all_is_what_everyone_gets(world):
    expected = mean([given(rank) for rank in range(world)])
    for found in together(world, lambda path: Channel(path=path)(given(path.rank), KEYS)):
        for x, right in zip(found, expected, strict=True):
            assert x.shape == right.shape
            torch.testing.assert_close(x, right)


@pytest.mark.parametrize(("aggregate", "right"), [(median, 3.0), (trimmed_mean(1), 4.0), (krum(1), 3.0)])
def test_other_aggregates(aggregate, right):
    sent = [2.0, 3.0, 3.0, 6.0, 1e9]

    def work(path):
        return Channel(path=path, aggregate=aggregate)([torch.full((4,), sent[path.rank])], ["x"])

    for (found,) in together(5, work):
        assert found.tolist() == [right] * 4


def test_a_liar_and_a_nan_do_not_move_robust_aggregates():
    honest = [torch.randn(50) * 0.1 + 1 for _ in range(6)]
    for lie in (torch.full((50,), 1e30), torch.full((50,), torch.nan), torch.full((50,), -torch.inf)):
        for aggregate in (median, trimmed_mean(2), krum(2)):
            (found,) = aggregate([[x] for x in [*honest, lie]])
            assert (found - 1).abs().max() < 0.5


@settings(max_examples=25, deadline=None)
@given_(st.integers(1, 4), st.integers(1, 6), st.sampled_from([Half(), Cast(torch.bfloat16), Cast(torch.float16)]))
def test_delivered_and_owed_are_what_was_given(world, calls, codec):
    def work(path):
        compress = Compress(codec, error_feedback=True)
        channel = Channel(compress, path=path)
        got = [channel(given(path.rank, call), KEYS) for call in range(calls)]
        return got, compress.owed

    found = together(world, work)
    for at, key in enumerate(KEYS):
        sent = sum(given(rank, call)[at].double() for rank in range(world) for call in range(calls))
        owed = sum(owed[key].double() for _, owed in found)
        delivered = sum(got[at].double() for got in found[0][0]) * world
        torch.testing.assert_close(delivered + owed, sent, atol=1e-5 * calls, rtol=1e-5)


def test_what_half_leaves_out_comes_later():
    def work(path):
        channel = Channel(Compress(Half()), path=path)
        return [channel([torch.ones(4)], ["x"])[0].tolist() for _ in range(3)]

    for first, second, _ in together(2, work):
        assert first == [1.0, 1.0, 0.0, 0.0]
        assert second == [1.0, 1.0, 0.0, 0.0]


def test_an_overflow_reaches_everyone_and_poisons_nothing():
    def work(path):
        compress = Compress(Cast(torch.bfloat16), error_feedback=True)
        channel = Channel(compress, path=path)
        channel([torch.full((3,), 1.001)], ["x"])
        before = compress.owed["x"].clone()
        bad = torch.tensor([1.0, torch.inf if path.rank else 1.0, 2.0])
        (found,) = channel([bad], ["x"])
        return found, before, compress.owed["x"]

    first, second = together(2, work)
    for found, _, owed in (first, second):
        assert torch.isinf(found[1])
        assert torch.isfinite(owed).all()
        assert not found.isnan().any()
    assert torch.equal(second[1], second[2])


def test_what_is_owed_follows_its_connections_and_the_rest_is_told():
    compress = Compress(Half())
    compress.owed["x"] = torch.tensor([1.0, 2.0, 4.0])
    compress.remapped("x", Remap(torch.tensor([2, -1, 0]), 3), (3,))
    assert compress.owed["x"].tolist() == [4.0, 0.0, 1.0]
    assert compress.forgone == {"x": 2.0}
    compress.owed["z"] = torch.arange(6.0).view(2, 3)
    compress.remapped("z", Remap(torch.tensor([0, 2, 3, 5]), 6), (2, 2))  # a dense layer without its second input
    assert compress.owed["z"].tolist() == [[0.0, 2.0], [3.0, 5.0]]
    assert compress.forgone["z"] == 5.0
    compress.remapped("y", Remap(torch.tensor([0]), 1), (1,))  # of which nothing is owed
    with pytest.raises(ValueError, match="tell the channel of changed places"):
        compress.send(torch.zeros(4), "x")


def test_weighed_workers_make_the_mean_over_all_samples():
    samples = [torch.randn(n, 3) for n in (1, 5, 0, 2)]

    def work(path):
        mine = samples[path.rank]
        local = mine.mean(0) if len(mine) else torch.zeros(3)
        return Channel(Weigh(len(mine)), path=path)([local], ["x"])

    for (found,) in together(4, work):
        torch.testing.assert_close(found, torch.cat(samples).mean(0))
    for (found,) in together(2, lambda path: Channel(Weigh(0), path=path)([torch.zeros(3)], ["x"])):
        assert found.tolist() == [0.0] * 3


def test_everyone_is_shortened_by_itself():
    def work(path):
        return Channel(Clip(1.0), path=path)([torch.tensor([3.0, 4.0]) * (10.0 if path.rank else 0.1)], ["x"])

    for (found,) in together(2, work):
        torch.testing.assert_close(found, torch.tensor([0.3 + 0.6, 0.4 + 0.8]) / 2)
    assert Clip(1.0).send(torch.zeros(3), "x").tolist() == [0.0] * 3
    torch.testing.assert_close(Clip(1.0).send(torch.full((4,), 1e30), "x"), torch.full((4,), 0.5))
    assert not Clip(1.0).send(torch.tensor([1.0, torch.inf]), "x").isfinite().all()


def test_resuming_goes_on_where_it_was():
    def work(path):
        def channel():
            return Channel(Weigh(path.rank + 1), Compress(Half()), path=path, seed=3)

        whole, first, second = channel(), channel(), channel()
        expected = [whole(given(path.rank, call), KEYS) for call in range(5)]
        found = [first(given(path.rank, call), KEYS) for call in range(3)]
        second.load_state_dict(first.state_dict())
        found += [second(given(path.rank, call), KEYS) for call in range(3, 5)]
        return expected, found

    for expected, found in together(2, work):
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_random_draws_differ_between_workers_and_calls_and_a_resumed_channel_draws_as_the_whole_one():
    codec = RandomK(0.1, values=Cast(torch.bfloat16))

    def drawn(channel):
        channel([torch.ones(200)], ["x"])
        return tuple((channel.stages[0].owed["x"] == 0).nonzero().flatten().tolist())

    def work(path):
        whole, resumed = (Channel(Compress(codec), path=path) for _ in range(2))
        draws = [drawn(whole) for _ in range(3)]
        resumed.load_state_dict(whole.state_dict())
        draws.append(drawn(whole))
        assert drawn(resumed) == draws[3]
        return draws

    draws = [positions for worker in together(4, work) for positions in worker]
    assert {len(positions) for positions in draws} == {20}
    assert len(set(draws)) == 16


def test_workers_out_of_step_are_told():
    def work(path):
        channel = Channel(path=path)
        channel.calls = 3 + path.rank
        with pytest.raises(ExchangeError, match="others are at another one"):
            channel([torch.ones(2)], ["x"])
        return channel.calls

    assert together(3, work) == [3, 4, 5]


def test_a_worker_that_does_not_come_is_an_error():
    def work(path):
        if path.rank:
            return None
        with pytest.raises(ExchangeError, match="did not come within"):
            Channel(path=path)([torch.ones(2)], ["x"])
        return "told"

    assert together(2, work, timeout_seconds=0.3) == ["told", None]


@pytest.mark.parametrize(
    "change", [lambda w: w[:-1], lambda w: torch.cat([w, w[:1]]), lambda w: w[:3], lambda w: w[:0]]
)
@pytest.mark.parametrize("codec", [None, Cast(torch.bfloat16)])
def test_torn_and_longer_messages_are_refused(change, codec):
    tensors = [torch.randn(4, 5), torch.randn(3)]
    form = MessageFormat(tensors, codec, 2)
    wire, _ = form.write(tensors, (1.0, 2.0), torch.Generator())
    assert wire.numel() == form.nbytes
    assert form.read(wire, 1, ["x", "y"])[1] == [1.0, 2.0]
    with pytest.raises(ExchangeError, match="worker 1"):
        form.read(change(wire), 1, ["x", "y"])


def test_what_cannot_be_is_refused():
    def work(path):
        with pytest.raises(ValueError, match="must be the last stage"):
            Channel(Compress(Half()), Clip(1.0), path=path)
        with pytest.raises(ValueError, match="shows the sum of all workers only"):
            Channel(Weigh(1.0), path=path, aggregate=median)
        with pytest.raises(ValueError, match="a worker has one weight"):
            Channel(Weigh(2.0), Weigh(3.0), path=path)
        with pytest.raises(TypeError, match="made of Stage objects"):
            Channel(Half(), path=path)
        with pytest.raises(ValueError, match="key of its own"):
            Channel(path=path)([torch.ones(1), torch.ones(1)], ["x", "x"])
        with pytest.raises(ValueError, match="of a channel of 0 stages"):
            Channel(Stage(), path=path).load_state_dict({"calls": 0, "stages": []})

    together(1, work)
    for bad, text in (
        (lambda: Clip(0.0), "above 0"),
        (lambda: trimmed_mean(-1), "at least none"),
        (lambda: krum(-1), "faulty"),
        (lambda: Compress(RandomK(0.1), error_feedback=True), "grow without bound"),
    ):
        with pytest.raises(ValueError, match=text):
            bad()
    with pytest.raises(ValueError, match="leave none"):
        trimmed_mean(1)([[torch.ones(1)]] * 2)
    with pytest.raises(ValueError, match="at least 5 workers"):
        krum(1)([[torch.ones(1)]] * 4)
    with pytest.raises(ValueError, match="weight is at least 0"):
        Weigh(float("nan")).weight()


@pytest.mark.parametrize("make", [trimmed_mean, krum])
def test_workers_say_what_their_aggregate_stands(make):
    def said(number):
        return together(1, lambda path: repr(Channel(path=path, aggregate=make(number))))

    assert said(1) == said(1) != said(2)


@pytest.mark.parametrize("codec", [RandomK(0.1, values=Cast(torch.bfloat16)), TopK(0.1, values=NaturalCompression())])
def test_what_is_owed_stays_bounded(codec):
    def work(path):
        compress = Compress(codec)
        assert compress.owes
        channel, generator = Channel(compress, path=path), torch.Generator().manual_seed(0)
        for _ in range(150):
            channel([torch.randn(300, generator=generator)], ["x"])
        assert float(compress.owed["x"].norm()) < 20 * 300**0.5

    together(1, work)
