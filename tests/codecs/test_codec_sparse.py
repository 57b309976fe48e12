"""TopK keeps just the largest, RandomK each with the same chance; neither loses anything that error feedback could not keep."""

import math

import pytest
import torch
from codec_cases import CODECS
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.codecs import NaturalCompression, Payload, RandomK, SignSGD, TopK
from noctule.testing.codecs import check_unbiased


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 400), st.floats(0.001, 1.0), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_topk_keeps_the_largest_as_they_are(n, fraction, seed):
    x = torch.randn(n, generator=generator(seed))
    y = TopK(fraction).decode(TopK(fraction).encode(x))
    k = max(1, round(fraction * n))
    kept = y != 0
    assert int(kept.sum()) == k
    assert torch.equal(y[kept], x[kept])
    if k < n:
        assert x[kept].abs().min() > x[~kept].abs().max()
    assert torch.equal(y + (x - y), x)


def test_top_k_keeps_at_least_so_many_of_each_tensor():
    codec = TopK(0.01, at_least=5)
    for n, kept in ((0, 0), (3, 3), (5, 5), (200, 5), (1000, 10)):
        x = torch.arange(1.0, n + 1.0)
        assert codec.decode(codec.encode(x)).count_nonzero() == kept
    with pytest.raises(ValueError, match="at_least=0"):
        TopK(0.1, at_least=0)


def test_equal_magnitudes_go_to_the_first():
    x = torch.tensor([1.0, -2.0, 2.0, 2.0, -1.0, 2.0])
    assert TopK(0.5).decode(TopK(0.5).encode(x)).tolist() == [0.0, -2.0, 2.0, 2.0, 0.0, 0.0]
    assert TopK(0.5).decode(TopK(0.5).encode(torch.zeros(6))).tolist() == [0.0] * 6


@pytest.mark.parametrize("n", [65_535, 65_536, 65_537, 300_000])
def test_positions_in_many_blocks(n):
    x = torch.zeros(n)
    places = torch.tensor([0, 65_535, 65_536, 131_071, 131_072, 200_000, n - 1])
    x[places[places < n]] = 1.0
    codec = TopK(7 / n)
    payload = codec.encode(x)
    assert torch.equal(codec.decode(payload), x)
    assert payload.nbytes == 4 * -(-n // 65_536) + 7 * (2 + 4)


def test_topk_then_natural_stays_under_two_percent():
    x = torch.randn(1_000_000, generator=generator())
    codec = TopK(1 / 64, values=NaturalCompression())
    payload = codec.encode(x, generator())
    assert payload.nbytes == 4 * 16 + 15_625 * (2 + 1) + 16
    assert 8 * payload.nbytes < 0.02 * 32 * x.numel()
    y, exact = codec.decode(payload), TopK(1 / 64).decode(TopK(1 / 64).encode(x))
    assert torch.equal(y != 0, exact != 0)
    assert bool(((y / exact)[exact != 0].log2().abs() < 1).all())


def test_values_have_the_bytes_of_their_dtype():
    x = torch.randn(1000, generator=generator())
    assert TopK(0.1).encode(x).nbytes - TopK(0.1).encode(x.half()).nbytes == 100 * 2
    assert TopK(0.1).encode(x.double()).nbytes - TopK(0.1).encode(x).nbytes == 100 * 4


def test_what_is_not_finite_is_sent_first():
    x = torch.arange(10.0)
    x[3], x[4] = math.nan, -math.inf
    y = TopK(0.2).decode(TopK(0.2).encode(x))
    assert y[3].isnan()
    assert y[4] == -math.inf
    assert y.nonzero().flatten().tolist() == [3, 4]


def test_positions_that_cannot_be_are_refused():
    codec, x = TopK(0.5), torch.arange(70_000.0)
    counts, offsets, values = codec.encode(x).parts

    def decode(counts, offsets):
        return codec.decode(Payload((counts, offsets, values), (70_000,), torch.float32))

    assert bool((decode(counts, offsets)[-1] == 69_999).all())
    for wrong in ([35_000, 1], [-1, 35_001], [2**31 - 1, 2**31 - 1]):
        with pytest.raises(ValueError, match="the blocks count"):
            decode(torch.tensor(wrong, dtype=torch.int32), offsets)
    with pytest.raises(ValueError, match=r"position \d+ of a tensor of 70000"):
        decode(torch.tensor([0, 35_000], dtype=torch.int32), offsets)


@given(st.integers(1, 300), st.floats(0.001, 1.0), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_randomk_scales_what_it_keeps(n, fraction, seed):
    x = torch.randn(n, generator=generator(seed)) + 10.0
    codec, k = RandomK(fraction), max(1, round(fraction * n))
    payload = codec.encode(x, generator(seed))
    assert payload.nbytes == 8 + 4 * k
    y = codec.decode(payload)
    kept = y != 0
    assert int(kept.sum()) == k
    torch.testing.assert_close(y[kept], x[kept] * (n / k))


def test_randomk_chooses_each_with_the_same_chance():
    n, k, draws, codec = 40, 10, 2000, RandomK(0.25)
    g = generator()
    chosen = sum((codec.decode(codec.encode(torch.ones(n), g)) != 0).double() for _ in range(draws))
    sigma = math.sqrt(draws * k / n * (1 - k / n))
    assert bool(((chosen - draws * k / n).abs() < 4 * sigma).all())


def test_randomk_has_the_second_moment_of_its_paper():
    x = torch.randn(4, 10, generator=generator())
    mean_square = check_unbiased(RandomK(0.25), x, draws=3000, sigmas=4.0)
    expected = float((x.double() ** 2).sum()) * (4 - 1)
    assert float(mean_square.sum()) == pytest.approx(expected, rel=0.1)


def test_randomk_notices_what_it_does_not_send():
    x = torch.zeros(1000)
    x[123] = math.nan
    y = RandomK(0.01).decode(RandomK(0.01).encode(x, generator()))
    assert int(y.isnan().sum()) == 10


def test_any_eight_bytes_are_a_seed():
    codec, x = RandomK(0.5), torch.ones(100)
    _, values = codec.encode(x).parts
    for seed in (0, -1, -(2**63), 2**63 - 1):
        y = codec.decode(Payload((torch.tensor([seed]), values), (100,), torch.float32))
        assert int((y == 2).sum()) == 50


def test_randomk_is_unbiased_if_its_values_are():
    assert RandomK(0.1, values=NaturalCompression()).unbiased
    assert not RandomK(0.1, values=SignSGD()).unbiased
    assert not TopK(1.0).unbiased


@pytest.mark.parametrize("kind", [TopK, RandomK])
@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_is_a_share(kind, fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got"):
        kind(fraction)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_sent_and_left_are_the_whole(codec):
    x = torch.randn(40, 50, generator=generator())
    y = codec.decode(codec.encode(x, generator()))
    torch.testing.assert_close(y + (x - y), x, rtol=0, atol=4e-5)  # one rounding of the largest of the three
