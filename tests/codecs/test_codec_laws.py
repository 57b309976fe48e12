"""Every codec keeps the laws of a codec, and the same ones in every code."""

import pytest
import torch
from codec_cases import CODECS, SETS, running
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.codecs import Cast, Exact, LowRank, pack, unpack
from noctule.testing.codecs import check_codec

ELEMENTWISE = [
    codec for codec in CODECS if not isinstance(codec, LowRank)
]  # others multiply matrices, whose sums may differ


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_codec_keeps_the_laws(codec):
    check_codec(codec, sigmas=4.0)


@pytest.mark.skipif(not SETS, reason="noctule._native is not built")
@pytest.mark.parametrize("codec", ELEMENTWISE, ids=str)
def test_neither_code_nor_threads_change_a_bit(codec):
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).double()
    wires, decoded = [], []
    for instruction_set in ["reference", *SETS]:
        for threads in (1, 3):
            with running(instruction_set, threads):
                payload = codec.encode(x, torch.Generator().manual_seed(1))
                wires.append(pack(payload))
                decoded.append(codec.decode(payload))
    assert all(torch.equal(wire, wires[0]) for wire in wires)
    assert all(torch.equal(y, decoded[0]) for y in decoded)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([0.0, 1e-42, 1e-30, 1e-5, 1.0, 6e4, 1e30]),
    seed=st.integers(0, 99),
)
def test_any_shape_dtype_and_scale(codec, shape, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    payload = codec.encode(x, generator)
    wire = pack(payload)
    assert wire.numel() == payload.nbytes
    y = codec.decode(unpack(codec, wire, tuple(shape), dtype))
    assert (y.shape, y.dtype) == (x.shape, dtype)
    if bool(x.isfinite().all()) and bool((x.abs() * 4 * max(1, x.numel()) < torch.finfo(dtype).max).all()):
        assert bool(y.isfinite().all()) or (isinstance(codec, Cast) and scale > 1e4)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_without_a_generator_torchs_own_is_used(codec):
    x = torch.randn(50)
    torch.manual_seed(5)
    a = pack(codec.encode(x))
    torch.manual_seed(5)
    assert torch.equal(pack(codec.encode(x)), a)
    assert torch.equal(pack(codec.encode(x, torch.Generator().manual_seed(5))), a)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.unbiased and codec != Exact()], ids=str)
def test_seeds_differ(codec):
    x, generator = torch.randn(500), torch.Generator().manual_seed(0)
    assert not torch.equal(pack(codec.encode(x, generator)), pack(codec.encode(x, generator)))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_parameter_is_a_tensor_too(codec):
    y = codec.decode(codec.encode(torch.nn.Parameter(torch.randn(20, 30))))
    assert not y.requires_grad


def test_a_wire_says_what_it_should_be():
    with pytest.raises(ValueError, match=r"Cast.*torch.float32 of shape \(3,\) in 6 bytes, got 7: the wire is torn"):
        unpack(Cast(), torch.zeros(7, dtype=torch.uint8), (3,), torch.float32)
    with pytest.raises(ValueError, match=r"uint8 tensor, got torch.int8 of shape \(6,\)"):
        unpack(Cast(), torch.zeros(6, dtype=torch.int8), (3,), torch.float32)


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("skip", range(5))
def test_parts_of_a_wire_need_not_be_aligned(start, skip):
    x = torch.randn(100)
    buffer = bytearray(start + skip) + bytes(pack(Cast().encode(x)).tolist())
    wire = torch.frombuffer(buffer, dtype=torch.uint8, offset=start)[skip:]
    assert torch.equal(Cast().decode(unpack(Cast(), wire, (100,), torch.float32)), x.bfloat16().float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    for codec in CODECS:
        check_codec(codec, device="cuda")
        if codec in ELEMENTWISE:
            wires = [pack(codec.encode(x.to(device), torch.Generator().manual_seed(1))) for device in ("cpu", "cuda")]
            assert torch.equal(wires[0], wires[1].cpu())
