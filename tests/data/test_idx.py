"""What was written as idx is read back; anything else is refused, quickly and in little memory."""

import gzip
import io
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from noctule.core.errors import DataError
from noctule.data.idx import parse_idx, read_idx

law = settings(deadline=None, derandomize=True, max_examples=100)
CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}
any_array = st.sampled_from(sorted(CODES)).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5))
)


def to_idx(array: np.ndarray) -> bytes:
    code = next(code for dtype, code in CODES.items() if np.dtype(dtype) == array.dtype)
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@law
@given(array=any_array, gzipped=st.booleans())
def test_round_trip(array: np.ndarray, gzipped: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "numbers"
    path.write_bytes(gzip.compress(to_idx(array), 1) if gzipped else to_idx(array))
    read = read_idx(path)
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert read.tobytes() == array.tobytes()


@law
@given(array=any_array, data=st.data(), gzipped=st.booleans())
def test_every_truncation_and_every_addition_is_noticed(
    array: np.ndarray, data: st.DataObject, gzipped: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "numbers"
    whole = gzip.compress(to_idx(array), 1) if gzipped else to_idx(array)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DataError, match="numbers"):
        read_idx(path)
    path.write_bytes(whole + data.draw(st.binary(min_size=1, max_size=9).filter(lambda tail: any(tail))))
    with pytest.raises(DataError, match="numbers"):
        read_idx(path)


@law
@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda tail: b"\0\0\x08\x02" + tail))
@example(b"")
@example(b"\x1f\x8b")
@example(b"\0\0\x08\x04" + b"\0\0\0\0" + b"\xff" * 12)
def test_garbage_is_read_as_what_it_says_or_refused(content: bytes) -> None:
    try:
        read = parse_idx(io.BytesIO(content), name="garbage")
    except DataError:
        return
    assert to_idx(read) == content


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("dimensions", range(1, 9))
def test_an_absurd_header_costs_no_memory(dimensions: int, gzipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    content = bytes([0, 0, 0x0E, dimensions]) + b"\xff\xff\xff\xff" * dimensions + b"some"
    path.write_bytes(gzip.compress(content) if gzipped else content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="but only 4 follow"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_no_such_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nowhere: No such file"):
        read_idx(tmp_path / "nowhere")
