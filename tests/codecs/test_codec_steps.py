"""The elementary steps are the same in every code."""

import pytest
import torch
from codec_cases import SETS, running
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.codecs import native, reference

pytestmark = pytest.mark.skipif(not SETS, reason="noctule._native is not built")
CPU = torch.device("cpu")


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bucket", [1, 7, 64, 1000])
def test_uniforms(instruction_set, bucket):
    for n in (0, 1, 63, 5003):
        for seed in (0, 2**63 - 1):
            with running(instruction_set, threads=2):
                u = native.uniforms(seed, n, bucket, CPU)
            assert torch.equal(u, reference.uniforms(seed, n, bucket, CPU))
            assert bool(((u >= 0) & (u < 1)).all())


def test_uniforms_are_uniform():
    u = native.uniforms(3, 400_000, 512, CPU)
    counts = torch.histc(u, 100, 0.0, 1.0)
    assert ((counts - 4000) ** 2 / 4000).sum() < 99 + 5 * (2 * 99) ** 0.5
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 5 / 400_000**0.5


@pytest.mark.parametrize("instruction_set", SETS)
@given(st.integers(1, 7), st.integers(0, 200), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_bits_side_by_side(instruction_set, bits, n, seed):
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    with running(instruction_set, threads=2):
        packed = native.pack_bits(codes, bits)
        back = native.unpack_bits(packed, n, bits)
    assert torch.equal(packed, reference.pack_bits(codes, bits))
    assert torch.equal(back, codes)
    assert torch.equal(reference.unpack_bits(packed, n, bits), codes)
    number = sum(code << bits * i for i, code in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == number.to_bytes((n * bits + 7) // 8, "little")


@pytest.mark.parametrize("instruction_set", SETS)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-42, 1e30, torch.inf, -torch.inf, torch.nan]),
        min_size=1,
        max_size=99,
    ),
    st.floats(0, 1),
    st.integers(1, 4),
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_largest_with_many_ties(instruction_set, numbers, fraction, threads):
    x = torch.tensor(numbers)
    k = round(fraction * len(numbers))
    key = [(number != number, -1.0 if number != number else abs(number)) for number in numbers]
    oracle = sorted(sorted(range(len(numbers)), key=lambda i: key[i], reverse=True)[:k])
    with running(instruction_set, threads):
        assert native.largest(x, k).tolist() == oracle
    assert (reference.largest(x, k) if k else torch.empty(0)).tolist() == oracle


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_largest_of_long_tensors(instruction_set, spread):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_001, generator=generator) * torch.exp(spread * torch.randn(200_001, generator=generator))
    for k in (1, 2, 2000, 100_000, 200_000, 200_001):
        with running(instruction_set, threads=3):
            assert torch.equal(native.largest(x, k), reference.largest(x, k))


def test_addresses_are_not_misread():
    codes, floors = native.natural_encode(torch.ones(100), 10, 0)
    for wrong in (
        lambda: native.natural_encode(torch.ones(100).double(), 10, 0),
        lambda: native.natural_encode(torch.ones(200)[::2], 10, 0),
        lambda: native.natural_decode(codes, floors[:-1], 10),
        lambda: native.natural_decode(codes.to(torch.int64), floors, 10),
        lambda: native.unpack_bits(codes[:9], 20, 4),
        lambda: native.pack_bits(codes.to(torch.int32), 4),
        lambda: native.largest(torch.ones(5).half(), 2),
    ):
        with pytest.raises(ValueError, match="side by side on the CPU, got"):
            wrong()
    for k in (-1, 6):
        with pytest.raises(ValueError, match=f"no {k} largest of 5"):
            native.largest(torch.ones(5), k)
