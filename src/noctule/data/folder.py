"""Reader of the user's own files: a table, arrays or pictures, in one file or in a folder."""

import re
from pathlib import Path

import numpy as np

from noctule.core.errors import DataError
from noctule.data.arrays import PARTS
from noctule.data.frame import Arrays, unnamed
from noctule.data.idx import read_idx
from noctule.data.images import SUFFIXES as IMAGE_SUFFIXES
from noctule.data.images import classes_of, find_images, read_classes, read_images
from noctule.data.npz import PART_WORDS, find_keys, read_npy, read_npz
from noctule.data.objects import read_object
from noctule.data.parquet import read_parquet
from noctule.data.preparation import Preparation, Samples
from noctule.data.table import read_table

_TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".data", ".dat", ".tab", ".psv")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_IDX_NAME = re.compile(r"(train|validation|test|t10k)-(images|labels)[-.]idx\d-ubyte(?:\.gz)?")
KINDS = "CSV, Parquet, .npz, .npy, idx files or folders of pictures"
_EXPECTED = (
    "put there train.csv or train.parquet (with or without validation and test), or a .npz with x_train and y_train, or a "
    "folder of PNG or JPEG files for each class, or idx files called as those of MNIST (train-images-idx3-ubyte, "
    "train-labels-idx1-ubyte, t10k-..., gzipped or not)"
)


def read_path(path: Path, *, like: Preparation | None = None) -> dict[str, Samples]:
    """Read the samples of a file or a folder by part: train and, if there, validation and test.

    In a folder idx files go before .npz, then .npy, Parquet, CSV, and folders of pictures. Files called train,
    validation and test are the parts and others are left alone; a single file may have any name.

    Args:
        path: the file or folder.
        like: the preparation of a model that predicts these samples; they may lack labels.

    Raises:
        DataError: a file is broken, or nothing can be read; with the file and the remedy.
    """
    if not path.is_file():
        return _read_folder(path, like)
    return _read_files({"train": path}, like)


def _read_files(files: dict[str, Path], like: Preparation | None) -> dict[str, Samples]:
    """Read files of one kind, a part each; a single .npz may hold all parts."""
    made: dict[str, Samples] = {}
    for part, path in files.items():
        if path.suffix.lower() != ".npz":
            made[part] = _read_file(path, like)
            continue
        held = read_npz(path, labels=like is None)
        if len(files) == 1:
            return dict(held)
        if held.keys() != {"train"}:
            raise DataError(f"{path} has several parts but is not alone; keep one such file, or give each part its own")
        made[part] = held["train"]
    return made


def _read_file(path: Path, like: Preparation | None) -> Samples:
    suffix = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if suffix in _TEXT_SUFFIXES:
        return read_table(path)
    if suffix in _PARQUET_SUFFIXES:
        return read_parquet(path)
    if suffix == ".npy":
        return _of_array(read_npy(path), path, like)
    if suffix in IMAGE_SUFFIXES and like is not None:
        return _pictures([path], [path.name], like, str(path))
    raise DataError(
        f"{path} is no file of a kind that can be read: {KINDS}; for idx files name the folder of all of them"
    )


def _of_array(array: np.ndarray, path: Path, like: Preparation | None) -> Samples:
    """A single array: named columns, or a matrix whose last column is the target."""
    if array.dtype.names:
        return next(iter(read_object(array).values()))
    if array.ndim == 2 and array.dtype.kind in "biuf" and (like is None or like.is_table):
        return unnamed(array, source=str(path))
    if like is None:
        raise DataError(f"{path} holds an array of shape {array.shape} without labels; save x and y as .npz")
    return Arrays(array, None, source=str(path))


def _read_folder(folder: Path, like: Preparation | None) -> dict[str, Samples]:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    if idx := {(match[1], match[2]): path for path in files if (match := _IDX_NAME.fullmatch(path.name))}:
        return _read_idx(folder, idx)
    if npz := _by_part(folder, [path for path in files if path.suffix.lower() == ".npz"]):
        return _read_files(npz, like)
    if npy := {path.stem: path for path in files if path.suffix.lower() == ".npy"}:
        return _read_npy(folder, npy, like)
    for suffixes in (_PARQUET_SUFFIXES, _TEXT_SUFFIXES):
        tables = [path for path in files if path.name.lower().removesuffix(".gz").endswith(suffixes)]
        tables = [path for path in tables if path.suffix != ".txt" or len(tables) == 1 or _part(path)]
        if (found := _by_part(folder, tables)) and not (like is None and classes_of(folder)):
            return _read_files(found, like)
    return _read_pictures(folder, like)


def _part(path: Path) -> str | None:
    return PART_WORDS.get(path.name.split(".")[0].lower())


def _by_part(folder: Path, files: list[Path]) -> dict[str, Path]:
    if len(files) == 1:
        return {"train": files[0]}
    parts = {part: path for path in files if (part := _part(path))}
    if files and "train" not in parts:
        names = ", ".join(path.name for path in files[:10])
        raise DataError(f"the folder {folder} holds {names} but none of them is called train; {_EXPECTED}")
    return {part: parts[part] for part in PARTS if part in parts}


def _read_idx(folder: Path, files: dict[tuple[str, str], Path]) -> dict[str, Samples]:
    arrays: dict[str, Samples] = {}
    for part, file_part in (("train", "train"), ("validation", "validation"), ("test", "test"), ("test", "t10k")):
        images, labels = files.get((file_part, "images")), files.get((file_part, "labels"))
        if images and labels:
            arrays[part] = Arrays(read_idx(images), read_idx(labels), source=str(images), always_classes=True)
        elif images or labels or part == "train":
            missing = "labels-idx1-ubyte" if images else "images-idx3-ubyte"
            raise DataError(f"the folder {folder} lacks {file_part}-{missing} (or the same with .gz); put it there")
    return arrays


def _read_npy(folder: Path, files: dict[str, Path], like: Preparation | None) -> dict[str, Samples]:
    if len(files) == 1:
        return {"train": _read_file(next(iter(files.values())), like)}
    keys = find_keys(f"the folder {folder}", list(files), labels=like is None)
    return {
        part: Arrays(read_npy(files[x]), None if y is None else read_npy(files[y]), source=str(files[x]))
        for part, (x, y) in keys.items()
    }


def _read_pictures(folder: Path, like: Preparation | None) -> dict[str, Samples]:
    """Read class folders, in the folder or in its train, validation and test; with `like`, pictures in any folders."""
    parts = {
        part: path
        for path in sorted(folder.iterdir())
        if path.is_dir() and (part := PART_WORDS.get(path.name.lower())) and find_images(path)
    }
    if "train" not in parts or not classes_of(parts["train"]):
        parts = {"train": folder}
    classes = classes_of(parts["train"])
    if like is not None and not classes and (paths := find_images(folder)):
        return {"train": _pictures(paths, [str(path.relative_to(folder)) for path in paths], like, str(folder))}
    if not classes:
        raise DataError(f"the folder {folder} holds no data that can be read; {_EXPECTED}")
    mode, size = _form(like)
    return dict(read_classes(parts, mode=mode, size=size))


def _pictures(paths: list[Path], names: list[str], like: Preparation, source: str) -> Arrays:
    mode, size = _form(like)
    if size is None:
        raise DataError(
            f"{source} holds pictures, but the model was not trained on pictures; give data of the same kind"
        )
    return Arrays(read_images(paths, mode=mode, size=size), None, source=source, files=names)


def _form(like: Preparation | None) -> tuple[str, tuple[int, int] | None]:
    """Mode and size of the pictures in a preparation; "" and None without one."""
    if like is None or like.shape is None or len(like.shape) not in (2, 3):
        return "", None
    return ("L" if len(like.shape) == 2 or like.shape[0] == 1 else "RGB"), (like.shape[-2], like.shape[-1])
