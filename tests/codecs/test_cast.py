import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.codecs import Cast, Codec

SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    shape=SHAPES,
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_shape_dtype_bytes_and_error_bound(shape, half, dtype):
    x = torch.randn(shape, dtype=dtype)
    codec = Cast(half)
    payload = codec.encode(x)
    back = codec.decode(payload)
    assert payload.nbytes == 2 * x.numel()
    assert (back.shape, back.dtype) == (x.shape, dtype)
    assert torch.all((back - x).abs() <= torch.finfo(half).eps * x.abs())
    assert torch.equal(codec.decode(codec.encode(back)), back)


def test_it_is_a_codec_and_refuses_integers():
    assert isinstance(Cast(), Codec)
    with pytest.raises(ValueError, match="floating"):
        Cast(torch.int8)


def test_an_infinite_number_does_not_vanish():
    for eight in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        with pytest.raises(ValueError, match=r"use torch\.float8_e5m2"):
            Cast(eight)
    codec = Cast(torch.float8_e5m2)
    assert not codec.decode(codec.encode(torch.tensor([torch.inf, -torch.inf, 1e6]))).isfinite().any()
