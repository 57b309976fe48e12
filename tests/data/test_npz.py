"""What was saved as .npz is read back; broken archives, objects and other keys are refused."""

import contextlib
import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from noctule.core.errors import DataError
from noctule.data.npz import find_keys, read_npz

law = settings(deadline=None, derandomize=True, max_examples=50)
any_array = arrays.arrays(
    st.sampled_from(["u1", "i8", ">i4", "f2", "f4", "f8", "U3"]), arrays.array_shapes(max_dims=3, max_side=4)
)


def saved(compress: bool = True, **contents: object) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **contents)  # type: ignore[arg-type]
    return file.getvalue()


@law
@given(x=any_array, y=any_array, others=st.sets(st.sampled_from(["validation", "test"])), compress=st.booleans())
def test_round_trip(
    x: np.ndarray, y: np.ndarray, others: set[str], compress: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "own.npz"
    parts = ["train", *others]
    path.write_bytes(saved(compress, **{f"x_{part}": x for part in parts}, **{f"y_{part}": y for part in parts}))
    read = read_npz(path)
    assert set(read) == set(parts)
    for inputs, labels in ((part.inputs, part.labels) for part in read.values()):
        assert labels is not None
        assert inputs.dtype == x.dtype
        assert inputs.shape == x.shape
        assert inputs.tobytes() == x.tobytes()
        assert labels.dtype == y.dtype
        assert labels.shape == y.shape
        assert labels.tobytes() == y.tobytes()


WHOLE = saved(x=np.arange(12.0).reshape(4, 3), y=np.arange(4), words=np.array(["a", "b"]))


@settings(law, max_examples=300)
@given(data=st.data())
def test_a_damaged_archive_is_read_the_same_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "own.npz"
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), len(damaged) // 2, 10, 0]))])
    with contextlib.suppress(DataError):  # or only dates and the like were hit: the checksums of the archive hold
        train = read_npz(path)["train"]
        assert train.inputs.tolist() == np.arange(12.0).reshape(4, 3).tolist()
        assert train.labels is not None
        assert train.labels.tolist() == [0, 1, 2, 3]


@law
@given(content=st.binary(max_size=200))
def test_garbage_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "own.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"own\.npz is corrupt or no \.npz archive"):
        read_npz(path)


def test_python_objects_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    path.write_bytes(saved(x=np.array([{"a": 1}], dtype=object), y=np.arange(1)))
    with pytest.raises(DataError, match="holds Python objects"):
        read_npz(path)


@pytest.mark.parametrize("dtype", ["<f8", "<U0"])
def test_a_member_that_claims_terabytes_costs_no_memory(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (1000000, 1000000)}}".ljust(117) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        for key in "xy":
            archive.writestr(f"{key}.npy", b"\x93NUMPY\1\0" + bytes([len(header), 0]) + header.encode() + b"1234")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="too short for the shape"):
            read_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "keys",
    [
        ["x"],
        ["y"],
        ["x_test", "y_test"],
        ["x", "y", "x_train", "y_train"],
        ["a", "b"],
        ["X", "x", "y"],
        ["x_train", "y_val"],
    ],
)
def test_other_keys_are_named(keys: list[str], tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    path.write_bytes(saved(**{key: np.zeros(2) for key in keys}))
    with pytest.raises(DataError, match=f"has the keys {', '.join(sorted(keys))}.*; it needs x_train and y_train"):
        read_npz(path)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["X", "y"], ["train"]),
        (["data", "target"], ["train"]),
        (["images", "labels", "names"], ["train"]),
        (["X_train", "y_train", "X_test", "y_test"], ["train", "test"]),
        (["train_images", "train_labels", "val_images", "val_labels"], ["train", "validation"]),
        (["trainX", "x-train", "Y_TRAIN", "features_valid", "targets_valid"], ["train", "validation"]),
    ],
)
def test_usual_keys(keys: list[str], parts: list[str]) -> None:
    found = find_keys("own.npz", keys, labels=True)
    assert list(found) == parts
    for inputs, labels in found.values():
        assert keys.index(str(labels)) == keys.index(inputs) + 1


def test_inputs_alone_do_where_labels_are_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    path.write_bytes(saved(X=np.zeros((2, 3))))
    assert read_npz(path, labels=False)["train"].labels is None


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    path.write_bytes(saved(**{key: np.zeros(2) for key in ("x_train", "y_train", "x_test")}))
    with pytest.raises(DataError, match="x_test"):
        read_npz(path)
