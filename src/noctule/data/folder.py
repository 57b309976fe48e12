"""The user's own data: a .npz or CSV file, or a folder of idx, .npz or CSV files."""

import re
from pathlib import Path

from noctule.data.arrays import PARTS, Arrays, make_parts
from noctule.data.dataset import Dataset
from noctule.data.idx import read_idx
from noctule.data.npz import read_npz
from noctule.data.table import read_table
from noctule.errors import DataError

_CSV_SUFFIXES = (".csv", ".tsv")
_IDX_NAME = re.compile(r"(train|validation|test|t10k)-(images|labels)[-.]idx\d-ubyte(?:\.gz)?")
_EXPECTED = (
    "put there train.csv (with or without validation.csv and test.csv), or a .npz with x_train and y_train, or idx "
    "files called as those of MNIST (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., gzipped or not)"
)


def read_path(path: Path) -> dict[str, Dataset]:
    """The parts, train and where given validation and test, that a file or a folder holds.

    In a folder idx files go before .npz, and .npz before CSV. Files called train, validation and test are the parts
    and others are left alone; a single file may have any name.

    Raises:
        DataError: nothing that can be read, or something broken; it says which file and what to do.
    """
    arrays = _read_file(path) if path.is_file() else _read_folder(path)
    try:
        return make_parts(arrays, name=path.stem if path.is_file() else path.resolve().name)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_file(path: Path) -> Arrays:
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    if path.suffix.lower() in _CSV_SUFFIXES:
        return _read_csv({"train": path})
    raise DataError(f"{path} is no .npz or CSV file; for idx files name the folder that holds all of them")


def _read_folder(folder: Path) -> Arrays:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    if idx := {(match[1], match[2]): path for path in files if (match := _IDX_NAME.fullmatch(path.name))}:
        return _read_idx(folder, idx)
    if npz := _by_part(folder, [path for path in files if path.suffix.lower() == ".npz"]):
        return _read_npz(npz)
    if table := _by_part(folder, [path for path in files if path.suffix.lower() in _CSV_SUFFIXES]):
        return _read_csv(table)
    raise DataError(f"the folder {folder} holds no data that can be read; {_EXPECTED}")


def _by_part(folder: Path, files: list[Path]) -> dict[str, Path]:
    if len(files) == 1:
        return {"train": files[0]}
    parts = {path.stem.lower(): path for path in files if path.stem.lower() in PARTS}
    if files and "train" not in parts:
        names = ", ".join(path.name for path in files[:10])
        raise DataError(f"the folder {folder} holds {names} but none of them is called train; {_EXPECTED}")
    return parts


def _read_idx(folder: Path, files: dict[tuple[str, str], Path]) -> Arrays:
    arrays = {}
    for part, file_part in (("train", "train"), ("validation", "validation"), ("test", "test"), ("test", "t10k")):
        images, labels = files.get((file_part, "images")), files.get((file_part, "labels"))
        if images and labels:
            arrays[part] = read_idx(images), read_idx(labels)
        elif images or labels or part == "train":
            missing = "labels-idx1-ubyte" if images else "images-idx3-ubyte"
            raise DataError(f"the folder {folder} lacks {file_part}-{missing} (or the same with .gz); put it there")
    return arrays


def _read_npz(files: dict[str, Path]) -> Arrays:
    if len(files) == 1:
        return read_npz(files["train"])
    arrays = {part: read_npz(path) for part, path in files.items()}
    for part, path in files.items():
        if arrays[part].keys() != {"train"}:
            raise DataError(f"{path} has several parts but is not alone; keep one such file, or give each part its own")
    return {part: held["train"] for part, held in arrays.items()}


def _read_csv(files: dict[str, Path]) -> Arrays:
    tables = {part: read_table(path) for part, path in files.items()}
    for part, path in files.items():
        if tables[part].columns != tables["train"].columns:
            raise DataError(f"{path} and {files['train']} differ in their headers; give both the same columns in order")
    return {part: (table.inputs, table.labels) for part, table in tables.items()}
