"""The user's own files, of every format, become the same data sets, or an error that names the file."""

import contextlib
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from noctule.data import load
from noctule.data.folder import read_path
from noctule.errors import DataError

PICTURES = np.arange(10 * 2 * 3, dtype=np.uint8).reshape(10, 2, 3) * 4
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_csv(path: Path, inputs: np.ndarray, labels: list[str]) -> None:
    lines = ["a,b,label", *(",".join(map(str, [*row, label])) for row, label in zip(inputs, labels, strict=True))]
    path.write_text("\n".join(lines))


def test_idx_and_npz_give_the_same_sets(tmp_path: Path) -> None:
    idx, npz = tmp_path / "idx", tmp_path / "npz"
    idx.mkdir()
    npz.mkdir()
    write_idx(idx / "train-images-idx3-ubyte.gz", PICTURES)
    write_idx(idx / "train-labels-idx1-ubyte", LABELS)
    write_idx(idx / "t10k-images.idx3-ubyte", PICTURES[:4])
    write_idx(idx / "t10k-labels-idx1-ubyte.gz", LABELS[:4])
    np.savez(npz / "own.npz", x_train=PICTURES, y_train=LABELS, x_test=PICTURES[:4], y_test=LABELS[:4])
    for one, other in zip(read_path(idx).items(), read_path(npz).items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1].inputs, other[1].inputs)
        assert torch.equal(one[1].targets, other[1].targets)
        assert (one[1].classes, one[1].shape) == (other[1].classes, other[1].shape) == (3, (2, 3))
    train = read_path(idx)["train"]
    assert torch.equal(train.inputs, torch.from_numpy(PICTURES).flatten(1) / 255), "pixels are scaled to 0 .. 1"
    assert (train.name, read_path(npz / "own.npz")["train"].name) == ("idx", "own")


def test_numbers_of_a_table_are_taken_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=np.array([[1, 200], [3, 4]], dtype=np.uint8), y=np.array([0.0, 1.0]))
    train = read_path(tmp_path)["train"]
    assert train.inputs.tolist() == [[1, 200], [3, 4]]
    assert train.targets.tolist() == [0, 1]
    assert train.shape is None


def test_csv_parts_share_their_classes(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", np.ones((3, 2)), ["dog", "cat", "emu"])
    write_csv(tmp_path / "validation.csv", np.ones((1, 2)), ["emu"])
    write_csv(tmp_path / "test.csv", np.ones((2, 2)), ["dog", "cat"])
    (tmp_path / "notes.csv").write_text("not,to,be\nread")
    parts = read_path(tmp_path)
    assert {part: made.targets.tolist() for part, made in parts.items()} == {
        "train": [1, 0, 2],
        "validation": [2],
        "test": [1, 0],
    }
    assert {made.classes for made in parts.values()} == {3}


def test_npz_files_can_be_the_parts(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=np.ones((3, 2)), y=np.array(["b", "a", "b"]))
    np.savez(tmp_path / "test.npz", x=np.zeros((1, 2)), y=np.array(["b"]))
    parts = read_path(tmp_path)
    assert parts["train"].targets.tolist() == [1, 0, 1]
    assert parts["test"].targets.tolist() == [1]


def test_load_cuts_what_the_files_do_not(tmp_path: Path) -> None:
    write_csv(tmp_path / "any.csv", np.arange(40).reshape(20, 2), ["1", "0"] * 10)
    splits = load(tmp_path / "any.csv", validation_fraction=0.25)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [11, 5, 4]
    assert splits.train.name == "any"
    write_csv(tmp_path / "train.csv", np.ones((20, 2)), ["1", "0"] * 10)
    write_csv(tmp_path / "validation.csv", np.ones((3, 2)), ["1", "0", "0"])
    (tmp_path / "any.csv").unlink()
    splits = load(str(tmp_path))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16, 3, 4]


whatever = st.one_of(
    arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    for dtype in ("?", "u1", "u8", "i1", ">i8", "f2", "f4", "f8", "g", "c8", "S2", "U2", "U0", "M8[s]", "i4,f4")
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(x=whatever, y=whatever)
def test_any_two_arrays_are_a_data_set_or_a_clear_error(
    x: np.ndarray, y: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "whatever.npz"
    np.savez(path, x=x, y=y)
    with contextlib.suppress(DataError):
        train = read_path(path)["train"]
        assert len(train) == len(x) == len(y)
        assert torch.isfinite(train.inputs).all()
        assert 0 <= train.targets.min() <= train.targets.max() < train.classes


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (np.ones((3, 2)), np.array([0, -1, 1]), "train part: .* label -1 in row 1"),
        (np.ones((3, 2)), np.array([0, 1.5, 1]), "train part: the label 1.5 in row 1"),
        (np.ones((3, 2)), np.array([0, np.nan, 1]), "train part: the label nan in row 1"),
        (np.ones((3, 2)), np.array(["0", "1e30", "1"]), "train part: the label 1e"),
        (np.ones((3, 2)), np.array([1990, 2001, 2002]), "label 2002 in row 2 of the train part but only 3 samples"),
        (np.ones((3, 2)), np.eye(3), r"labels of shape \(3, 3\)"),
        (np.ones((3, 2)), np.array([b"a", b"b", b"a"]), "labels of type"),
        (np.ones((3, 2)), np.array([0, 1]), "3 inputs but 2 targets"),
        (np.ones(3), np.array([0, 1, 0]), r"\(samples, features\)"),
        (np.array([["a"], ["b"]]), np.array([0, 1]), "inputs are of type <U1"),
        (np.array([[1.0], [np.nan]]), np.array([0, 1]), "train part: .* input nan in row 1, feature 0"),
        (np.array([[1.0], [1e300]]), np.array([0, 1]), "input inf in row 1, feature 0"),
        (np.ones((0, 2)), np.array([]), "no train samples"),
        (np.ones((3, 0)), np.array([0, 1, 0]), "is empty"),
    ],
)
def test_arrays_that_cannot_be_are_named(x: np.ndarray, y: np.ndarray, says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=x, y=y)
    with pytest.raises(DataError, match=f"own.npz: .*{says}"):
        read_path(tmp_path / "own.npz")


def test_a_label_that_no_train_sample_has(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", np.ones((2, 2)), ["dog", "cat"])
    write_csv(tmp_path / "test.csv", np.ones((2, 2)), ["dog", "catt"])
    with pytest.raises(DataError, match=r"label 'catt' in row 1 of the test part, which no train sample has"):
        read_path(tmp_path)
    write_csv(tmp_path / "train.csv", np.ones((2, 2)), ["0", "1"])
    write_csv(tmp_path / "test.csv", np.ones((2, 2)), ["0", "2"])
    with pytest.raises(DataError, match=r"test part: .*label 2 in row 1; with 2 classes"):
        read_path(tmp_path)


def test_parts_with_other_columns(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", np.ones((2, 2)), ["0", "1"])
    (tmp_path / "test.csv").write_text("b,a,label\n1,2,0\n")
    with pytest.raises(DataError, match=r"test\.csv and .*train\.csv differ in their headers"):
        read_path(tmp_path)


def test_what_is_missing_or_too_much_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data that can be read; put there train\.csv"):
        read_path(tmp_path)
    write_csv(tmp_path / "one.csv", np.ones((2, 2)), ["0", "1"])
    write_csv(tmp_path / "two.csv", np.ones((2, 2)), ["0", "1"])
    with pytest.raises(DataError, match=r"holds one\.csv, two\.csv but none of them is called train"):
        read_path(tmp_path)
    np.savez(tmp_path / "train.npz", x_train=np.ones((2, 2)), y_train=LABELS[:2], x_test=np.ones((1, 2)), y_test=[0])
    np.savez(tmp_path / "test.npz", x=np.ones((1, 2)), y=[0])
    with pytest.raises(DataError, match=r"train\.npz has several parts but is not alone"):
        read_path(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", PICTURES)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", LABELS)
    with pytest.raises(DataError, match="lacks train-images-idx3-ubyte"):
        read_path(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", PICTURES)
    with pytest.raises(DataError, match="lacks train-labels-idx1-ubyte"):
        read_path(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "own.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"own\.parquet is no \.npz or CSV file"):
        read_path(tmp_path / "own.parquet")
