"""Natural compression: chances, moments, the ends of the range, bytes, and the same bits in every code."""

import math
import zlib

import pytest
import torch
from codec_cases import SETS, running
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.codecs import NaturalCompression, Payload, native, pack, reference, unpack

built = pytest.mark.skipif(not SETS, reason="noctule._native is not built")
CODEC = NaturalCompression()
DRAWS = 4000


def there_and_back(x, codec=CODEC, seed=0):
    return codec.decode(codec.encode(x, torch.Generator().manual_seed(seed)))


def draws_of(*values):
    """(DRAWS, values) decodings, each row in a bucket of its own."""
    x = torch.tensor(values).repeat(DRAWS, 1)
    return there_and_back(x, NaturalCompression(len(values))).double(), torch.tensor(values).double()


def test_powers_of_two_stay():
    x = torch.tensor([sign * 2.0**e for e in range(-62, 64) for sign in (1, -1)] + [0.0])
    assert torch.equal(there_and_back(x), x)
    for e in (-126, -125, 126, 127):
        assert there_and_back(torch.tensor([2.0**e])).item() == 2.0**e


@given(
    st.lists(st.floats(width=32, min_value=2.0**-60, max_value=2.0**60), min_size=1, max_size=50), st.integers(0, 99)
)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_a_number_becomes_a_neighbouring_power(numbers, seed):
    x = torch.tensor(numbers) * torch.randn(len(numbers)).sign()
    y = there_and_back(x, seed=seed)
    low = 2.0 ** torch.floor(torch.log2(x.double().abs()))
    assert bool(((y.abs() == low) | ((y.abs() == 2 * low) & (x.abs() != low))).all())
    assert torch.equal(y.sign(), x.sign())
    assert torch.equal(y + (x - y), x)


def test_chances_are_those_of_the_paper():
    y, x = draws_of(*(torch.linspace(1.0, 2.0, 65).tolist()), 0.3, -0.7, 1e-12, 1e12)
    low = 2.0 ** torch.floor(torch.log2(x.abs()))
    variance = (x.abs() - low) * (2 * low - x.abs())
    assert bool(((y.mean(0) - x).abs() <= 4 * (variance / DRAWS).sqrt() + 1e-12 * x.abs()).all())
    sampled = ((y - x) ** 2).mean(0)
    assert bool(((sampled - variance).abs() <= 6 * (variance * low**2 / DRAWS).sqrt()).all())
    assert bool((x**2 + variance <= 9 / 8 * x**2 * (1 + 1e-12)).all())


def test_the_second_moment_at_its_worst_is_nine_eighths():
    y, x = draws_of(*[4 / 3] * 50)
    assert (y**2).mean().item() / x[0].item() ** 2 == pytest.approx(9 / 8, abs=0.004)


def test_elements_are_drawn_apart():
    y, _ = draws_of(*[1.5] * 40)
    up = (y == 2.0).double()
    correlation = torch.corrcoef(up.t()) - torch.eye(40)
    assert correlation.abs().max() < 5 / math.sqrt(DRAWS)
    assert (torch.corrcoef(up[:40]) - torch.eye(40)).abs().max() < 0.7


def test_below_the_smallest_code_the_mean_is_right():
    smallest = 2.0 ** (100 - 125)
    shares = torch.tensor([0.9, 0.5, 0.25, 0.01, 0.0])
    y, _ = draws_of(2.0**100, *(smallest * shares).tolist(), smallest, 3 * smallest)
    assert bool(((y[:, 1:6] == 0) | (y[:, 1:6] == smallest)).all())
    assert bool((y[:, 6] == smallest).all())
    assert set(y[:, 7].tolist()) == {2 * smallest, 4 * smallest}
    off = (y[:, 1:6].mean(0) / smallest - shares).abs()
    assert bool((off <= 4 * (shares * (1 - shares) / DRAWS).sqrt()).all())


def test_denormals_become_the_smallest_normal_number_or_zero():
    tiny = torch.finfo(torch.float32).smallest_normal
    y, _ = draws_of(tiny / 2, -tiny / 4, tiny)
    assert set(y[:, 0].tolist()) == {0.0, tiny}
    assert set(y[:, 1].tolist()) == {0.0, -tiny}
    assert bool((y[:, 2] == tiny).all())
    assert y[:, 0].mean().item() / tiny == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(DRAWS))
    assert y[:, 1].mean().item() / tiny == pytest.approx(-0.25, abs=4 * 0.44 / math.sqrt(DRAWS))


def test_the_largest_numbers_round_to_inf_or_down():
    y, _ = draws_of(1.5 * 2.0**127, -32.0)
    assert set(y[:, 0].tolist()) == {2.0**127, math.inf}
    assert bool((y[:, 1] == -32.0).all())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_bucket_that_is_not_finite_is_nan_and_no_other_is(value):
    x = torch.ones(10)
    x[5] = value
    y = there_and_back(x, NaturalCompression(4))
    assert y.isnan().tolist() == [False] * 4 + [True] * 4 + [False] * 2


def test_bytes():
    for n, bucket in ((0, 7), (1, 7), (7, 7), (8, 7), (1000, 1024)):
        payload = NaturalCompression(bucket).encode(torch.randn(n))
        assert payload.nbytes == n + -(-n // bucket)
    for bad in (0, -1, 2**31):
        with pytest.raises(ValueError, match="bucket must be"):
            NaturalCompression(bad)


def test_deflated_codes_are_the_same_and_fewer():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    codec = NaturalCompression(entropy=True)
    payload = codec.encode(x, torch.Generator().manual_seed(1))
    assert torch.equal(codec.decode(payload), there_and_back(x, seed=1))
    assert 3.3 < 8 * payload.nbytes / x.numel() < 3.9  # the entropy of these codes is 3.59 bits
    zeros = codec.encode(torch.zeros(50_000))
    assert zeros.nbytes < 400


@given(st.integers(0, 300), st.floats(0.0, 60.0), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_deflating_costs_a_byte_at_most(n, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 2.0 ** (spread * torch.randn(n, generator=generator)).clamp(-100, 100)
    plain, deflated = (NaturalCompression(entropy=entropy).encode(x) for entropy in (False, True))
    assert deflated.nbytes <= plain.nbytes + 1


def test_torn_deflated_codes_are_refused():
    x, codec = torch.randn(5000), NaturalCompression(entropy=True)
    wire = pack(codec.encode(x))
    for changed in (wire[:-1], wire[:5], torch.cat([wire, wire[:1]]), wire[:6]):
        with pytest.raises(ValueError, match="torn"):
            codec.decode(unpack(codec, changed, (5000,), torch.float32))
    for at in range(6, 200):
        flipped = wire.clone()
        flipped[at] ^= 16
        with pytest.raises(ValueError, match="torn"):
            codec.decode(unpack(codec, flipped, (5000,), torch.float32))


def test_a_small_wire_cannot_ask_for_much_memory():
    bomb = torch.frombuffer(bytearray(b"\x00\x01" + zlib.compress(bytes(100_000_000), 9)), dtype=torch.uint8)
    codec = NaturalCompression(entropy=True)
    with pytest.raises(ValueError, match="are not 10 codes"):
        codec.decode(unpack(codec, bomb, (10,), torch.float32))


BITS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x3F800000, 0x3F7FFFFF]),
)


@built
@pytest.mark.parametrize("instruction_set", SETS)
@given(
    st.lists(BITS.filter(lambda b: b >> 23 & 255 != 255), max_size=200), st.integers(1, 70), st.integers(0, 2**63 - 1)
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_native_is_reference_on_any_bits(instruction_set, words, bucket, seed):
    x = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)
    with running(instruction_set, threads=2):
        codes, floors = native.natural_encode(x, bucket, seed)
        y = native.natural_decode(codes, floors, bucket)
    for a, b in zip((codes, floors), reference.natural_encode(x, bucket, seed)):
        assert torch.equal(a, b)
    assert torch.equal(y.view(torch.int32), reference.natural_decode(codes, floors, bucket).view(torch.int32))


@built
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e30])
def test_native_is_reference_on_long_tensors(instruction_set, scale):
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0)) * scale
    x[5000:5010] *= 1e-36
    x[7000] = math.inf
    with running(instruction_set, threads=3):
        codes, floors = native.natural_encode(x, 1024, 5)
        y = native.natural_decode(codes, floors, 1024)
    right = reference.natural_encode(x, 1024, 5)
    assert torch.equal(codes, right[0])
    assert torch.equal(floors, right[1])
    assert torch.equal(y.view(torch.int32), reference.natural_decode(*right, 1024).view(torch.int32))


@built
@pytest.mark.parametrize("instruction_set", SETS)
def test_any_bytes_decode_alike(instruction_set):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256)
    floors = torch.arange(256, dtype=torch.uint8)
    with running(instruction_set):
        y = native.natural_decode(codes, floors, 256)
    assert torch.equal(y.view(torch.int32), reference.natural_decode(codes, floors, 256).view(torch.int32))
    payload = Payload((floors, codes), (256, 256), torch.float32)
    assert NaturalCompression(256).decode(payload)[255].isnan().all()
