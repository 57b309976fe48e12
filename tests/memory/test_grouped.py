"""Groups in few bits: native = reference, errors within a step, zeros and signs exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.kernels.native import _native
from noctule.memory import grouped, native, reference
from noctule.memory.grouped import encode, group_of

SETS = _native.instruction_sets() if _native else []
PARTS = ("scale_G", "base_G", "codes", "counts_G", "bitmap")
SHAPES = [(2, 3, 28, 28), (4, 9, 7, 7), (3, 1000), (5, 130), (1, 1)]


def made(shape, kind, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).flatten()
    if kind == "relu":
        return x.relu()
    if kind == "sparse":
        return x * (x.abs() > 1.2)
    return x + 100.0 if kind == "shifted" else x


@pytest.fixture
def instruction_set(request):
    before = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield
    _native.use_instruction_set(before)


@pytest.mark.skipif(not SETS, reason="noctule._native is not built")
@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("instruction_set")
def test_native_is_the_reference(shape, monkeypatch):
    for bits in range(1, 9):
        for kind in ("normal", "relu", "sparse", "shifted"):
            x, encoded, decoded = made(shape, kind, bits), [], []
            for code in (native, reference):
                monkeypatch.setattr(grouped, "_code_for", lambda x, code=code: code)
                encoded.append(encode(x, bits, group_of(shape)))
                decoded.append(encoded[0].decode())
            for part in PARTS:
                a, b = (getattr(e, part) for e in encoded)
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b), (bits, kind, part)
            assert torch.equal(*decoded)
            assert torch.equal(decoded[0].signbit(), decoded[1].signbit())


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(["normal", "relu", "sparse", "shifted"]),
    st.integers(1, 8),
    st.integers(0, 99),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_errors_zeros_and_signs(shape, kind, bits, seed):
    x = made(shape, kind, seed)
    e = encode(x, bits, group_of(shape))
    y, step = e.decode(), e.scale_G.repeat_interleave(e.group)[: x.numel()]
    assert bool(((x - y).abs() <= step / 2 * 1.001 + x.abs() * 1e-6).all())
    assert bool((y[x == 0] == 0).all())
    if e.bitmap is not None and kind == "relu":
        assert torch.equal(x > 0, y > 0)


def test_fewer_bits_where_the_step_is_wide():
    x = made((2, 3, 28, 28), "normal", 0)
    wide, narrow = (encode(x, 8, 784, step=step) for step in (0.5, 1e-4))
    assert wide.bits == 4
    assert narrow.bits == 8
    assert bool((wide.scale_G >= 0.5).all())
    assert wide.nbytes < 0.6 * narrow.nbytes


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_not_finite(bad):
    x = torch.zeros(1000)
    x[777] = bad
    assert encode(x, 8, 256) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = made((2, 3, 28, 28), "normal", 0).to(dtype)
    y = encode(x, 8, 784).decode()
    assert y.dtype is dtype
    assert float((x - y).abs().max()) < 0.03


def test_one_value():
    for value in (0.0, 3.0, -1e-20, 1e30):
        x = torch.full((512,), value)
        assert torch.allclose(encode(x, 8, 256).decode(), x, rtol=1e-5, atol=1e-29)
