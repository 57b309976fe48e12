"""What a file holds of a weight is the weight."""

import graphs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.runtime.weights import Places, Weight


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 900), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_places_and_back(rows, columns, density, seed):
    flat = np.flatnonzero(np.random.default_rng(seed).random(rows * columns) < density**3)
    places = Places.smallest(flat, rows, columns)
    np.testing.assert_array_equal(places.flat(rows, columns), flat)
    assert len(places.data) <= rows * -(-columns // 8)


def test_gaps_of_any_length():
    flat = np.array([0, 254, 255, 510, 511, 1023, 1278, 1534, 20000])
    places = Places.smallest(flat, 1, 200_001)
    assert places.kind == "gaps"
    np.testing.assert_array_equal(places.flat(1, 200_001), flat)


def test_ten_per_cent_of_a_layer_in_a_seventeenth_of_its_bytes():
    flat = np.flatnonzero(np.random.default_rng(0).random(2**20) < 0.1)
    assert 2**22 / (Places.smallest(flat, 1024, 1024).data.nbytes + len(flat)) > 19


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_codes_are_rows_of_scales(density, block):
    w = graphs.weight(8, 20, density if block == 1 else 0.3, codes=True, block=block)
    assert w.scales is not None
    np.testing.assert_allclose(w.dense(w.floats), w.dense(w.integers).astype(np.float32) * w.scales[:, None], rtol=1e-6)
    np.testing.assert_array_equal(w.row_sums(), w.dense(w.integers).sum(1, dtype=np.int64))


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 8), (1, 0, 2)])
def test_codes_of_few_bits(bits, low, high):
    codes = np.random.default_rng(0).integers(low, high, 35).astype(np.int8)
    codes = codes * 2 - 1 if bits == 1 else codes
    raw = (codes > 0 if bits == 1 else codes + 8).astype(np.uint8)
    packed = np.packbits(
        np.unpackbits(raw[:, None], axis=1, bitorder="little", count=bits).reshape(-1), bitorder="little"
    )
    w = Weight((5, 7), packed, bits, np.ones(5, np.float32))
    np.testing.assert_array_equal(w.integers, codes.reshape(5, 7))


def test_a_book():
    book = np.array([-1.0, 0.5, 2.0], np.float32)
    w = Weight((2, 2), np.array([0, 2, 1, 1], np.uint8), 8, book=book)
    assert w.floats.tolist() == [[-1.0, 2.0], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shape": (0, 4)}, "no matrix"),
        ({"shape": (2**20, 2**20)}, "no matrix"),
        ({"shape": (3, 4)}, "values must be float32"),
        ({"values": np.array([np.nan] * 8, np.float32)}, "NaN"),
        ({"values": np.zeros(8)}, "values must be float32"),
        ({"block": 4}, "no matrix"),
        ({"scales": np.ones(2, np.float32)}, "have none"),
        ({"bits": 8, "values": np.zeros(8, np.int8)}, "codes have scales"),
        ({"bits": 8, "values": np.zeros(8, np.int8), "scales": np.ones(3, np.float32)}, "scales must be"),
        ({"bits": 8, "values": np.full(8, 1, np.uint8), "book": np.ones(1, np.float32)}, "outside of a book"),
        ({"places": Places("bitmap", np.full(2, 255, np.uint8), 8)}, "behind the end of a row"),
        ({"places": Places("bitmap", np.full(3, 15, np.uint8), 8)}, "a bitmap of 3 bytes"),
        ({"places": Places("bitmap", np.full(2, 7, np.uint8), 8)}, "6 places are not 8"),
        ({"places": Places("gaps", np.array([0] * 7 + [1], np.uint8), 8)}, "lead out"),
        ({"places": Places("gaps", np.array([0] * 8 + [255], np.uint8), 8)}, "lead out"),
    ],
)
def test_what_cannot_be_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        Weight(**({"shape": (2, 4), "values": np.ones(8, np.float32)} | change))
