"""Codecs with levels for each bucket: what they decode to, their variance bounds, their bytes, the ends of their ranges."""

import math

import pytest
import torch

from noctule.codecs import QSGD, Affine, LowRank, NaturalDithering, Payload, SignSGD, TernGrad

BUCKETS_OF_TEN = [QSGD(bucket=10), NaturalDithering(bucket=10), TernGrad(10), SignSGD(10), Affine(group=10)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def there_and_back(codec, x, seed=0):
    return codec.decode(codec.encode(x, generator(seed)))


def mean_square_error(codec, x, draws=20_000):
    """Of each element, over draws in buckets of their own, whose mean is the tensor."""
    error = there_and_back(codec, x.repeat(draws, 1)).double() - x.double()
    mean_square = (error**2).mean(0)
    seldom = 16 * float(error.abs().max()) / draws  # Bernstein: what happens seldom may not have happened yet
    assert bool((error.mean(0).abs() <= 4 * (mean_square / draws).sqrt() + seldom).all())
    return mean_square


NORMAL = torch.randn(64, generator=generator(3))
SPARSE = torch.zeros(64).index_fill(0, torch.tensor([3, 40]), 1.0) * NORMAL


@pytest.mark.parametrize("x", [NORMAL, SPARSE, torch.ones(64)], ids=["normal", "sparse", "ones"])
@pytest.mark.parametrize("levels", [1, 3, 7, 100])
def test_qsgd_keeps_its_variance_bound(levels, x):
    error = mean_square_error(QSGD(levels, bucket=64), x).sum()
    norm, d = x.double().norm() ** 2, x.numel()
    assert error <= min(d / levels**2, math.sqrt(d) / levels) * norm * 1.05


@pytest.mark.parametrize("x", [NORMAL, SPARSE, torch.ones(64)], ids=["normal", "sparse", "ones"])
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("levels", [1, 3, 7, 30])
def test_dithering_keeps_its_variance_bound(levels, p, x):
    error = mean_square_error(NaturalDithering(levels, p=p, bucket=64), x).sum()
    a = 64 ** (1 / min(p, 2)) * 2.0 ** (1 - levels)
    assert error <= (1 / 8 + a * min(1.0, a)) * x.double().norm() ** 2 * 1.05


def test_terngrad_has_the_variance_of_a_coin():
    x = NORMAL
    error = mean_square_error(TernGrad(64), x)
    m, a = x.double().abs().max(), x.double().abs()
    expected = a * (m - a)
    assert bool(((error - expected).abs() <= 6 * m**2 / math.sqrt(20_000)).all())


def test_the_highest_level_is_never_passed():
    x = torch.ones(2_000_000)  # the sum of level and random number rounds up once in 260,000 times
    assert torch.equal(there_and_back(QSGD(127, bucket=1), x), x)


def test_levels_are_those_of_the_papers():
    x = torch.randn(3000, generator=generator()).view(-1, 100)
    norm = x.norm(dim=1, keepdim=True)
    found = there_and_back(QSGD(5, bucket=100), x) / norm * 5
    torch.testing.assert_close(found, found.round(), atol=1e-4, rtol=0)
    assert found.abs().max() >= 2
    most = x.abs().amax(1, keepdim=True)
    assert set((there_and_back(TernGrad(100), x) / most).unique().tolist()) == {-1.0, 0.0, 1.0}
    found = (there_and_back(NaturalDithering(4, bucket=100), x) / most).abs().unique()
    assert found.tolist() == [0.0, 0.125, 0.25, 0.5, 1.0]
    norms = x.abs().pow(3).sum(1, keepdim=True).pow(1 / 3)
    found = (there_and_back(NaturalDithering(4, p=3, bucket=100), x) / norms).abs()
    powers = torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0])
    assert ((found[..., None] - powers).abs().min(-1).values < 1e-6).all()


@pytest.mark.parametrize(
    ("codec", "bits", "scale_bytes"),
    [
        (QSGD(1, bucket=100), 2, 4),
        (QSGD(3, bucket=100), 3, 4),
        (QSGD(7, bucket=100), 4, 4),
        (QSGD(8, bucket=100), 5, 4),
        (QSGD(63, bucket=100), 7, 4),
        (QSGD(127, bucket=100), 8, 4),
        (NaturalDithering(15, bucket=100), 5, 4),
        (NaturalDithering(31, bucket=100), 6, 4),
        (TernGrad(100), 2, 4),
        (SignSGD(100), 1, 4),
        (Affine(8, group=100), 8, 8),
        (Affine(4, group=100), 4, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [0, 1, 100, 101, 1003])
def test_bytes(codec, bits, scale_bytes, n):
    assert codec.encode(torch.randn(n)).nbytes == scale_bytes * math.ceil(n / 100) + math.ceil(bits * n / 8)


@pytest.mark.parametrize("codec", [QSGD(127), NaturalDithering(127), TernGrad(), SignSGD(), Affine(8)], ids=str)
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-38, 1e-20, 1e20, 3e36])
def test_numbers_at_the_ends_of_the_range(codec, scale):
    x = torch.randn(700, generator=generator()).clamp(-5, 5) * scale
    y = there_and_back(codec, x)
    assert bool(y.isfinite().all())
    assert y.abs().max() <= 10 * x.abs().max() + 2e-38
    if scale > 1e-30:
        assert 0.3 < (y * x.sign() / scale).double().mean() < 2.5


@pytest.mark.parametrize("codec", BUCKETS_OF_TEN, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_bucket_that_is_not_finite_is_nan_and_no_other_is(codec, value):
    x = torch.randn(25, generator=generator())
    x[13] = value
    assert there_and_back(codec, x).isnan().tolist() == [False] * 10 + [True] * 10 + [False] * 5


def test_signs_and_the_mean_of_each_bucket():
    x = torch.tensor([1.0, -3.0, 0.0, 8.0, -2.0])
    y = there_and_back(SignSGD(3), x)
    torch.testing.assert_close(y, torch.tensor([4 / 3, -4 / 3, 4 / 3, 5.0, -5.0]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [1, 50, 64, 1000])
def test_affine_is_off_by_half_a_step(bits, n):
    x = torch.randn(n, generator=generator()) + 3.0
    group = 64
    error = (there_and_back(Affine(bits, group=group), x) - x).abs()
    off = (there_and_back(Affine(bits, group=group, stochastic=True), x) - x).abs()
    for at in range(0, n, group):
        part = x[at : at + group]
        step = (part.max() - part.min()) / (2**bits - 1)
        assert error[at : at + group].max() <= 0.5 * step + 1e-6
        assert off[at : at + group].max() <= step + 1e-6


def test_affine_keeps_constants_and_both_ends():
    for value in (0.0, -3.7, 1e-40, 1e38):
        x = torch.full((300,), value)
        assert torch.equal(there_and_back(Affine(), x), x)
    x = torch.linspace(-1.0, 2.0, 256)
    y = there_and_back(Affine(4, group=256), x)
    assert y[0] == -1.0
    assert y[-1] == pytest.approx(2.0)
    assert Affine(stochastic=True).unbiased
    assert not Affine().unbiased
    beyond = torch.tensor([-3e38, 3e38])
    assert bool(there_and_back(Affine(), beyond).isnan().all())


def test_levels_that_cannot_be_are_refused():
    codec = QSGD(2, bucket=4)
    scales, _ = codec.encode(torch.ones(2)).parts
    with pytest.raises(ValueError, match="level 7 of 5"):
        codec.decode(Payload((scales, torch.tensor([0b111111], dtype=torch.uint8)), (2,), torch.float32))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: QSGD(0), "levels must be from 1 to 127, got 0"),
        (lambda: QSGD(128), "levels must be"),
        (lambda: NaturalDithering(0), "levels must be"),
        (lambda: NaturalDithering(p=0.5), "p must be at least 1, got 0.5"),
        (lambda: TernGrad(0), "bucket must be"),
        (lambda: SignSGD(0), "bucket must be"),
        (lambda: Affine(5), "Affine has 4 or 8 bits, got 5"),
        (lambda: Affine(group=0), "group must be"),
        (lambda: LowRank(0), "rank and iterations must be"),
    ],
)
def test_impossible_options(make, text):
    with pytest.raises(ValueError, match=text):
        make()


class TestLowRank:
    def test_low_rank_comes_back(self):
        x = torch.randn(30, 3, generator=generator()) @ torch.randn(3, 50, generator=generator(1))
        torch.testing.assert_close(there_and_back(LowRank(3), x), x, rtol=1e-4, atol=1e-4)
        y = x.view(30, 5, 10)
        payload = LowRank(3).encode(y)
        assert payload.nbytes == 4 * 3 * (30 + 50)
        torch.testing.assert_close(LowRank(3).decode(payload), y, rtol=1e-4, atol=1e-4)

    def test_it_comes_near_the_best_approximation(self):
        x = torch.randn(60, 40, generator=generator()) * torch.linspace(1, 0, 40) ** 3
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        best = (x - u[:, :4] * s[:4] @ v[:4]).norm()
        errors = [(there_and_back(LowRank(4, iterations=i), x) - x).norm() for i in (1, 2, 8)]
        assert best * 0.999 <= errors[2] < errors[1] < errors[0]
        assert errors[1] < 1.15 * best

    def test_vectors_and_what_would_not_shrink_go_as_they_are(self):
        for shape in ((100,), (), (3, 5), (2, 1000), (0, 9), (8, 8)):
            x = torch.randn(shape, generator=generator()).bfloat16()
            payload = LowRank(4).encode(x)
            assert payload.nbytes == x.nbytes
            assert torch.equal(LowRank(4).decode(payload), x)

    def test_what_is_not_finite_is_nan_everywhere(self):
        for value in (math.inf, math.nan):
            x = torch.randn(40, 40)
            x[3, 4] = value
            assert bool(there_and_back(LowRank(2), x).isnan().all())
