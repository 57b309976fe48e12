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

from noctule.core.errors import DataError
from noctule.data import Dataset, load
from noctule.data.folder import read_path
from noctule.data.frame import Arrays
from noctule.data.prepare import prepare

PICTURES = np.arange(10 * 2 * 3, dtype=np.uint8).reshape(10, 2, 3) * 4
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def arrays_of(path: Path) -> dict[str, Arrays]:
    parts = read_path(path)
    assert all(isinstance(part, Arrays) for part in parts.values())
    return parts  # type: ignore[return-value]


def whole(path: Path) -> Dataset:
    """The train part with all of its samples, as if there were others to validate and to test on."""
    train = read_path(path)["train"]
    return prepare({"train": train, "validation": train, "test": train}, name=path.stem).train


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
    for one, other in zip(arrays_of(idx).items(), arrays_of(npz).items(), strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1].inputs, other[1].inputs)
        np.testing.assert_array_equal(one[1].labels, other[1].labels)
    train = whole(idx)
    assert (train.classes, train.shape) == (3, (2, 3))
    assert torch.equal(train.inputs, torch.from_numpy(PICTURES).flatten(1) / 255), "pixels are scaled to 0 .. 1"
    assert (load(idx).train.name, load(npz / "own.npz").train.name) == ("idx", "own")


def test_numbers_of_an_array_are_taken_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=np.array([[1, 200], [3, 4]], dtype=np.uint8), y=np.array([0.0, 1.0]))
    train = whole(tmp_path / "own.npz")
    assert train.inputs.tolist() == [[1, 200], [3, 4]]
    assert train.targets.tolist() == [0, 1]
    assert train.shape is None


def test_csv_parts_share_their_classes(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", np.arange(6).reshape(3, 2), ["dog", "cat", "emu"])
    write_csv(tmp_path / "validation.csv", np.ones((1, 2)), ["emu"])
    write_csv(tmp_path / "test.csv", np.ones((2, 2)), ["dog", "cat"])
    (tmp_path / "notes.csv").write_text("not,to,be\nread")
    with pytest.warns(UserWarning, match="no sample of cat, dog is in the validation part; no sample of emu"):
        splits = load(tmp_path)
    assert splits.validation is not None
    assert splits.train.targets.tolist() == [1, 0, 2]
    assert splits.validation.targets.tolist() == [2]
    assert splits.test.targets.tolist() == [1, 0]
    assert splits.preparation is not None
    assert splits.preparation.target.labels == ("cat", "dog", "emu")


def test_npz_files_can_be_the_parts(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=np.ones((3, 2)), y=np.array(["b", "a", "b"]))
    np.savez(tmp_path / "test.npz", x=np.zeros((1, 2)), y=np.array(["b"]))
    parts = arrays_of(tmp_path)
    assert [parts[part].labels.tolist() for part in ("train", "test")] == [["b", "a", "b"], ["b"]]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["parts of .npy", "a matrix in .npy", "records in .npy"])
def test_npy(kind: str, tmp_path: Path) -> None:
    x, y = np.arange(24.0).reshape(12, 2), np.arange(12) % 3
    if kind == "parts of .npy":
        np.save(tmp_path / "X_train.npy", x)
        np.save(tmp_path / "y_train.npy", y)
        path = tmp_path
    else:
        path, whole = tmp_path / "own.npy", np.column_stack([x, y])
        records = np.array([tuple(row) for row in whole], dtype=[("a", "f8"), ("b", "f8"), ("label", "f8")])
        np.save(path, records if kind.startswith("records") else whole)
    splits = load(path, validation_fraction=0)
    assert (splits.train.features, splits.train.classes) == (2, 3)
    assert len(splits.train) + len(splits.test) == 12


def test_load_cuts_what_the_files_do_not(tmp_path: Path) -> None:
    write_csv(tmp_path / "any.csv", np.arange(40).reshape(20, 2), ["1", "0"] * 10)
    splits = load(tmp_path / "any.csv", validation_fraction=0.25)
    assert splits.validation is not None
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [11, 5, 4]
    assert splits.train.name == "any"
    write_csv(tmp_path / "train.csv", np.arange(40).reshape(20, 2), ["1", "0"] * 10)
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
        train = whole(path)
        assert len(train) == len(x) == len(y)
        assert torch.isfinite(train.inputs).all()
        assert torch.isfinite(train.targets).all()
        assert not train.classes or 0 <= train.targets.min() <= train.targets.max() < train.classes


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (np.ones((3, 2)), np.array([]), "the target .label. has no label"),
        (np.ones((3, 2)), np.array([0, np.nan, 1]), "row 1: no label"),
        (np.ones((3, 2)), np.array([1, 1, 1]), "the target 'label' is '1' in all 3 rows"),
        (np.ones((3, 2)), np.array([0.5, 1e300, 1]), "row 1: 1e.300 in the target 'label' is no finite number"),
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
    parts = {
        f"{role}_{part}": array for part in ("train", "validation", "test") for role, array in (("x", x), ("y", y))
    }
    np.savez(tmp_path / "own.npz", **parts)
    with pytest.raises(DataError, match=f"own.npz.*{says}"):
        load(tmp_path / "own.npz")


@pytest.mark.parametrize("labels", [("dog", "cat", "catt"), ("0", "1", "2")])
def test_a_label_that_no_train_sample_has(labels: tuple[str, str, str], tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", np.arange(4).reshape(2, 2), [*labels[:2]])
    write_csv(tmp_path / "test.csv", np.ones((2, 2)), [labels[0], labels[2]])
    with pytest.raises(DataError, match=rf"test\.csv, line 3 has the label '{labels[2]}', which no train sample has"):
        load(tmp_path)


def test_columns_of_parts_are_matched_by_name(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", np.array([[1, 10], [2, 20]]), ["0", "1"])
    (tmp_path / "test.csv").write_text("b,a,label\n30,3,0\n40,4,1\n")
    (tmp_path / "validation.csv").write_text("label,a,b\n1,5,50\n0,6,60\n")
    splits = load(tmp_path)
    assert splits.test.inputs.tolist() == [[3, 30], [4, 40]]
    assert splits.validation is not None
    assert splits.validation.inputs.tolist() == [[5, 50], [6, 60]]
    (tmp_path / "test.csv").write_text("b,c,label\n30,3,0\n")
    with pytest.raises(DataError, match=r"test\.csv and .*train\.csv differ in their headers \(a, c\)"):
        load(tmp_path)


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
    (tmp_path / "own.docx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"own\.docx is no file of a kind that can be read: CSV, Parquet"):
        read_path(tmp_path / "own.docx")
