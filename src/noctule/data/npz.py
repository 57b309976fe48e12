"""NumPy's .npz archives, read without pickle and without believing the sizes they claim."""

import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from noctule.data.arrays import PARTS, Arrays
from noctule.errors import DataError

_MOST_DEFLATION = 1100
"""Deflate packs at most 1032 bytes into one: a larger claim is a lie."""


def read_npz(path: Path) -> Arrays:
    """The (inputs, labels) by part: keys x_train, y_train and, if there, the same of validation and test; or x and y.

    Raises:
        DataError: a broken archive, one that holds Python objects, or one with other keys than these.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            keys = _keys(path, list(members))
            return {
                part: (_read(archive, members[x], path), _read(archive, members[y], path))
                for part, (x, y) in keys.items()
            }
    except DataError:
        raise
    except Exception as error:  # a broken archive makes zipfile, zlib, ast and numpy raise some twenty kinds
        raise DataError(
            f"{path} is corrupt or no .npz archive ({type(error).__name__}: {error}); write it again"
        ) from error


def _keys(path: Path, found: list[str]) -> dict[str, tuple[str, str]]:
    wanted = {part: (f"x_{part}", f"y_{part}") for part in PARTS}
    if "x_train" not in found:
        wanted = {"train": ("x", "y")}
    pairs = {part: pair for part, pair in wanted.items() if pair[0] in found or pair[1] in found}
    known = {key for pair in pairs.values() for key in pair}
    alike = {key for key in found if key in ("x", "y") or key.startswith(("x_", "y_"))}
    if "train" not in pairs or known != alike:
        raise DataError(
            f"{path} has the keys {', '.join(sorted(found)) or 'none'}; it needs x_train and y_train, with or without "
            "x_validation and y_validation, x_test and y_test; or just x and y"
        )
    return pairs


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    if info.file_size > _MOST_DEFLATION * (info.compress_size + 1) or info.compress_size > path.stat().st_size:
        raise DataError(f"{path} is corrupt: {info.filename} claims {info.file_size} bytes; write it again")
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        if dtype.hasobject:
            raise DataError(f"{path}: {info.filename} holds Python objects, which are never loaded; save plain numbers")
        if math.prod(shape) * max(dtype.itemsize, 1) > info.file_size:
            raise DataError(f"{path} is corrupt: {info.filename} is too short for the shape {shape}; write it again")
    with archive.open(info) as stream:
        return npy.read_array(stream, allow_pickle=False)
