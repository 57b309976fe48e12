"""What was written as CSV is read back; what is no number is named with file, line and column."""

import contextlib
import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.data.table import read_table
from noctule.errors import DataError

law = settings(deadline=None, derandomize=True, max_examples=60)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@law
@given(
    rows=st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(finite, min_size=width, max_size=width), min_size=1, max_size=6)
    ),
    labels=st.lists(st.sampled_from(["cat", "dog", 'a "b", c', "0", "ä;\tß"]), min_size=6, max_size=6),
    delimiter=st.sampled_from(",;\t"),
    place=st.none() | st.integers(0, 4),
    name=st.sampled_from(["label", "Target", "CLASS", "y"]),
)
def test_round_trip(
    rows: list[list[float]],
    labels: list[str],
    delimiter: str,
    place: int | None,
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "own.csv"
    at = len(rows[0]) if place is None else min(place, len(rows[0]))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        header = [f"feature {number}" for number in range(len(rows[0]))]
        if place is not None:
            writer.writerow([*header[:at], name, *header[at:]])
        for row, label in zip(rows, labels, strict=False):
            if place is None:
                label = "dog" if label not in ("cat", "0") else label
            writer.writerow([*row[:at], label, *row[at:]])
    table = read_table(path)
    assert table.inputs.dtype == np.float32
    assert table.inputs.tolist() == np.array(rows, np.float32).tolist()
    if place is not None:
        assert table.labels.tolist() == labels[: len(rows)]
        assert table.columns == (*header[:at], name, *header[at:])
    else:
        assert table.columns is None
        assert len(table.labels) == len(rows)


@law
@given(content=st.binary(max_size=200) | st.text('0123456789,;\t"\n\re.-ab', max_size=80).map(str.encode))
def test_garbage_is_read_as_numbers_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "own.csv"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        table = read_table(path)
        assert np.isfinite(table.inputs).all()
        assert len(table.inputs) == len(table.labels) > 0


@pytest.mark.parametrize(
    ("first", "header"),
    [
        ("height,width,kind", True),
        ("0,1,label", True),
        ("label,0,1", True),
        ("1.5,2.5,kind", False),
        ("1.5,2.5,y", False),
        ("1,2,3", False),
    ],
)
def test_a_header_is_told_from_a_sample(first: str, header: bool, tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "own.csv", f"{first}\n1,2,3\n4,5,6\n"))
    assert (table.columns is not None) == header
    assert len(table.labels) == (2 if header else 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b,label\n1,2,0\n3,?,1\n", r"own.csv, line 3, column 2: '\?' is no finite number"),
        ("label,a,b\n0,1,2\n1,3,\n", "own.csv, line 3, column 3: '' is no finite number"),
        ("a,label,b\n1,0,2\n\n\n3,1,four\n", "own.csv, line 5, column 3: 'four' is no finite number"),
        ("1,2,0\n3,nan,1\n", "own.csv, line 2, column 2: 'nan' is no finite number"),
        ("1,2,0\n1e99,4,1\n", "own.csv, line 2, column 1: 'inf' is no finite number"),
        ("1,?,0\n3,4,1\n", r"own.csv, line 1, column 2: '\?' is no finite number"),
        ("1,2,0\n3,1\n", "own.csv, line 2: 2 cells, but the first line has 3"),
        ("1,2,0\n3,4, \n", "own.csv, line 2, column 3: no label"),
        (",a,label\n0,1,0\n", "own.csv: column 1 has no name in the header"),
        ("a,target,y\n1,2,3\n", "own.csv: the columns 'target', 'y' could each be the label"),
        ("a,b,label\n", "own.csv has a header but no samples"),
        ("", "own.csv needs at least one feature and the label"),
        ("label\n1\n", "own.csv needs at least one feature and the label"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read_table(write(tmp_path / "own.csv", text))


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(b"\xef\xbb\xbflabel,a\n1,2\n")
    assert read_table(path).columns == ("label", "a")


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(b"a,label\n1,\xff\n")
    with pytest.raises(DataError, match="no CSV text in UTF-8"):
        read_table(path)
