"""What was written as CSV is read back, whatever separates its cells; a wrong line is named with its place."""

import contextlib
import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.core.errors import DataError
from noctule.data.frame import Frame
from noctule.data.table import read_table

law = settings(deadline=None, derandomize=True, max_examples=60)
finite = st.floats(allow_nan=False, allow_infinity=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@law
@given(
    rows=st.integers(2, 4).flatmap(
        lambda width: st.lists(st.lists(finite, min_size=width, max_size=width), min_size=2, max_size=6)
    ),
    texts=st.lists(st.sampled_from(["cat", "dog", 'a "b", c', "0", "ä;\tß", "two words"]), min_size=6, max_size=6),
    separator=st.sampled_from(",;\t|"),
    header=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_round_trip(
    rows: list[list[float]],
    texts: list[str],
    separator: str,
    header: bool,
    newline: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "own.csv"
    names = [f"feature {number}" for number in range(len(rows[0]))]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator=newline, quoting=csv.QUOTE_NONNUMERIC)
        if header:
            writer.writerow([*names, "kind"])
        for row, text in zip(rows, texts, strict=False):
            writer.writerow([*row, text])
    frame = read_table(path)
    *numbers, labels = frame.columns.values()
    assert np.array_equal(np.stack(numbers, axis=1), np.array(rows))
    assert [str(label) for label in labels.tolist()] == (
        texts[: len(rows)] if labels.dtype == object else ["0.0"] * len(rows)
    )
    assert frame.named == header
    assert list(frame.columns)[:-1] == (names if header else [f"column {at + 1}" for at in range(len(names))])
    assert frame.lines is not None
    assert frame.lines.tolist() == [at + 1 + header for at in range(len(rows))]


@law
@given(content=st.binary(max_size=200) | st.text('0123456789,;\t|"# \n\re.-ab', max_size=80).map(str.encode))
def test_garbage_is_a_table_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "own.csv"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        frame = read_table(path)
        assert len(frame.columns) > 1
        assert {len(values) for values in frame.columns.values()} == {len(frame)} != {0}


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
    frame = read_table(write(tmp_path / "own.csv", f"{first}\n1,2,3\n4,5,6\n"))
    assert frame.named == header
    assert len(frame) == (2 if header else 3)


def test_a_first_line_whose_cells_come_again_below_is_a_sample(tmp_path: Path) -> None:
    frame = read_table(write(tmp_path / "mushrooms.data", "p,x,s\ne,x,y\np,b,s\n"))
    assert not frame.named
    assert frame.columns["column 1"].tolist() == ["p", "e", "p"]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("1 2 0\n3 4  1\n", {"column 1": [1, 3], "column 2": [2, 4], "column 3": [0, 1]}),
        ("a|b|y\n1|2|0\n3|4|1\n", {"a": [1, 3], "b": [2, 4], "y": [0, 1]}),
        ("# made by hand\n\na,b\n1,2\n# the end\n3,4\n", {"a": [1, 3], "b": [2, 4]}),
        ("# a b\n1 2\n3 4\n", {"a": [1, 3], "b": [2, 4]}),
        ("a;b\n1,5;x\n2,5;y\n", {"a": ["1,5", "2,5"], "b": ["x", "y"]}),
        ('name,age\n"Doe, ""J"", \njr",5\nRoe,\n', {"name": ['Doe, "J", \njr', "Roe"], "age": [5, np.nan]}),
        ("a,b\n1,?\n2,3\n", {"a": [1, 2], "b": [np.nan, 3]}),
        (",a,y\n0,5,1\n1,6,0\n", {"Unnamed: 0": [0, 1], "a": [5, 6], "y": [1, 0]}),
        ("a,a,y\n1,2,3\n", {"a": [1], "a.1": [2], "y": [3]}),
    ],
)
def test_separators_comments_quotes_and_gaps(text: str, columns: dict[str, list], tmp_path: Path) -> None:
    frame = read_table(write(tmp_path / "own.csv", text))
    assert list(frame.columns) == list(columns)
    for name, wanted in columns.items():
        np.testing.assert_array_equal(frame.columns[name], np.array(wanted, frame.columns[name].dtype))


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    frame = read_table(write(tmp_path / "own.csv", '# first\na,b\n1,"two\nlines"\n\n3,four\n'))
    assert [frame.place(row) for row in range(2)] == [f"{tmp_path}/own.csv, line {line}" for line in (4, 6)]
    assert frame.take(np.array([1])).place(0).endswith("line 6")


def test_gzip(tmp_path: Path) -> None:
    (tmp_path / "own.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert isinstance(frame := read_table(tmp_path / "own.csv.gz"), Frame)
    assert frame.columns["b"].tolist() == [2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,2,0\n3,1\n", "own.csv, line 2: 2 cells, but the first line has 3, separated by commas"),
        ("a;b;c\n1;2\n", "own.csv, line 2: 2 cells, but the first line has 3, separated by semicolons"),
        ("a,b,label\n", "own.csv has a header but no samples"),
        ("", "own.csv needs at least one feature and the label"),
        ("label\n1\n", "own.csv needs at least one feature and the label"),
        ("a^b^c\n1^2^3\n", r"separated by commas, semicolons, tabs, \| or blanks, which were not found"),
        ("1 3:0.5 7:1\n-1 2:1\n", "format of libsvm .*load_svmlight_file"),
        ("% iris\n@relation iris\n@data\n1,2\n", "ARFF file"),
        ("<!DOCTYPE html>\n<p>404</p>\n", "web page"),
        ('[{"a": 1},\n {"a": 2}]\n', "is JSON"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read_table(write(tmp_path / "own.csv", text))


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(b"\xef\xbb\xbflabel,a\n1,2\n")
    assert list(read_table(path).columns) == ["label", "a"]


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(b"a,label\n1,\xff\n")
    with pytest.raises(DataError, match="no CSV text in UTF-8"):
        read_table(path)
