"""PowerSGD: exact for gradients of its rank, nothing lost for others, the same bits on all workers."""

import pytest
import torch

from exchange_cases import together
from noctule.codecs import Cast, NaturalCompression
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Channel, Wrapped
from noctule.core.remap import Remap
from noctule.exchange import Compress, PowerSGD

KEYS = ["w", "conv", "bias", "small"]


def gradients(rank, call=0, *, low=False):
    generator = torch.Generator().manual_seed(10 * call + rank)
    w = torch.randn(20, 30, generator=generator)
    if low:
        shared = torch.Generator().manual_seed(99)
        w = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=shared)
    return [w, *(torch.randn(shape, generator=generator) for shape in ((8, 4, 3, 3), (30,), (2, 2)))]


def exchanges(world, work, rank=2):
    return together(world, lambda path: work(PowerSGD(rank, inner=Channel(path=path)), path.rank))


def test_a_mean_of_its_rank_is_exact_and_so_is_what_is_small():
    expected = [torch.stack(several).mean(0) for several in zip(*(gradients(rank, low=True) for rank in range(3)))]
    for found in exchanges(3, lambda power, rank: power(gradients(rank, low=True), KEYS)):
        for at in (0, 2, 3):
            torch.testing.assert_close(found[at], expected[at], atol=1e-5, rtol=1e-5)
        assert found[1].shape == expected[1].shape
        assert not torch.allclose(found[1], expected[1], atol=1e-2)


def test_delivered_and_owed_are_what_was_given_and_all_have_the_same_bits():
    def work(power, rank):
        return [power(gradients(rank, call), KEYS) for call in range(5)], power.owed

    everyone = exchanges(3, work)
    assert set(everyone[0][1]) == {"w", "conv"}
    for at, key in enumerate(KEYS[:2]):
        sent = sum(gradients(rank, call)[at].flatten(1) for rank in range(3) for call in range(5))
        owed = sum(owed[key].flatten(1) for _, owed in everyone)
        delivered = sum(got[at].flatten(1) for got in everyone[0][0]) * 3
        torch.testing.assert_close(delivered + owed, sent, atol=1e-4, rtol=1e-4)
    for got, _ in everyone[1:]:
        for a, b in zip(got, everyone[0][0], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_iteration_finds_the_largest_directions():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 3, generator=generator)).Q for n in (20, 30))
    matrix = u @ torch.diag(torch.tensor([100.0, 10.0, 0.1])) @ v.t()

    def work(power, rank):
        power([matrix], ["w"])
        power.owed.clear()
        return power([matrix], ["w"])[0]

    for found in exchanges(2, work):
        assert (found - matrix).norm() < 0.11  # all but the third


def test_an_overflow_reaches_everyone_and_does_not_stay():
    def work(power, rank):
        mine = gradients(rank)
        power(mine, KEYS)
        owed = power.owed["w"].clone()
        bad = [x.clone() for x in mine]
        if rank:
            bad[0][3, 4] = torch.inf
        found = power(bad, KEYS)
        assert torch.equal(power.owed["w"], owed)
        assert torch.isfinite(power.basis["w"]).all()
        return found

    for found in exchanges(2, work):
        assert found[0].isnan().all()
        assert torch.isfinite(found[2]).all()


def test_resuming_goes_on_where_it_was():
    def work(path):
        def power():
            return PowerSGD(2, inner=Channel(path=path))

        whole, first, second = power(), power(), power()
        expected = [whole(gradients(path.rank, call), KEYS) for call in range(4)]
        found = [first(gradients(path.rank, call), KEYS) for call in range(2)]
        second.load_state_dict(first.state_dict())
        return expected, found + [second(gradients(path.rank, call), KEYS) for call in range(2, 4)]

    for expected, found in together(2, work):
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class FailingOnce(Wrapped):
    """Another exchange, of which one call fails."""

    def __init__(self, inner, at):
        self._inner, self.left = inner, at

    @property
    def inner(self):
        return self._inner

    def __call__(self, tensors, keys):
        self.left -= 1
        if self.left == -1:
            raise ExchangeError("for once")
        return self.inner(tensors, keys)


@pytest.mark.parametrize("at", [2, 3])
def test_an_exchange_that_failed_and_is_repeated_is_as_if_it_had_never_failed(at):
    """Its first exchange, or its second, after which the first one has left something behind."""

    def work(path):
        def inner():
            return Channel(Compress(NaturalCompression(), error_feedback=True), path=path)

        whole, broken = PowerSGD(2, inner=inner()), PowerSGD(2, inner=FailingOnce(inner(), at))
        for power in (whole, broken):
            power(gradients(path.rank), KEYS)
        with pytest.raises(ExchangeError, match="for once"):
            broken(gradients(path.rank, 1), KEYS)
        for call in (1, 2):
            a, b = (power(gradients(path.rank, call), KEYS) for power in (whole, broken))
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        return len(whole.owed) == len(broken.owed) > 0

    assert all(together(2, work))


def test_a_matrix_that_becomes_narrower():
    def work(power, rank):
        power(gradients(rank), KEYS)
        kept = torch.arange(30)[::2]
        slots = (torch.arange(20)[:, None] * 30 + kept).flatten()
        before = power.owed["w"].clone()
        power.remapped("w", Remap(slots, 600), (20, 15))
        assert torch.equal(power.owed["w"], before[:, ::2])
        return power([gradients(rank, 1)[0][:, ::2]], ["w"])[0].shape

    assert exchanges(2, work) == [(20, 15)] * 2


def test_a_matrix_that_becomes_too_narrow_to_be_thin_gets_what_it_is_owed():
    def work(power, rank):
        power(gradients(rank), KEYS)
        slots = (torch.arange(20)[:, None] * 30 + torch.arange(2)).flatten()
        power.remapped("w", Remap(slots, 600), (20, 2))
        owed, mine = power.owed["w"].clone(), gradients(rank, 1)[0][:, :2]
        (got,) = power([mine], ["w"])
        assert "w" not in power.owed
        return got, mine + owed

    (got, a), (_, b) = exchanges(2, work)
    torch.testing.assert_close(got, (a + b) / 2)


def test_a_matrix_that_changes_its_width_while_nothing_is_owed():
    def work(power, rank):
        power(gradients(rank), KEYS)
        power.release()  # as a candidate that is left
        slots = (torch.arange(20)[:, None] * 30 + torch.arange(30)[::2]).flatten()
        power.remapped("w", Remap(slots, 600), (20, 15))
        return power([gradients(rank, 1)[0][:, ::2]], ["w"])[0].shape

    assert exchanges(2, work) == [(20, 15)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_as_they_were_and_lose_nothing(dtype):
    def work(power, rank):
        given = [gradients(rank, call)[0].to(dtype) for call in range(4)]
        got = [power([x], ["w"])[0] for x in given]
        assert all(x.dtype is dtype for x in got)
        return sum(x.double() for x in given), sum(x.double() for x in got), power.owed["w"].double()

    everyone = exchanges(2, work)
    sent, owed = sum(each[0] for each in everyone), sum(each[2] for each in everyone)
    torch.testing.assert_close(2 * everyone[0][1] + owed, sent, atol=1e-4, rtol=1e-4)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="at least rank 1"):
        PowerSGD(0, inner=None)


def test_factors_of_sixteen_bits_lose_nothing():
    def work(path):
        over = Channel(Compress(Cast(torch.bfloat16), error_feedback=False), path=path)
        power = PowerSGD(2, inner=over)
        assert power.rehearse(gradients(0), KEYS).sent_bytes == 2 * (2 * 20 + 2 * 8 + 30 + 4 + 2 * 30 + 2 * 36)
        return [power(gradients(path.rank, call), KEYS) for call in range(5)], power.owed

    everyone = together(2, work)
    for at, key in enumerate(KEYS[:2]):
        sent = sum(gradients(rank, call)[at].flatten(1) for rank in range(2) for call in range(5))
        owed = sum(owed[key].flatten(1) for _, owed in everyone)
        delivered = sum(got[at].flatten(1) for got in everyone[0][0]) * 2
        torch.testing.assert_close(delivered + owed, sent, atol=1e-4, rtol=1e-4)
