"""Reader of NumPy's .npz archives, without pickle and with a check of the sizes in their headers."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from noctule.core.errors import DataError
from noctule.data.arrays import PARTS
from noctule.data.frame import Arrays

PART_WORDS: dict[str, str] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PART_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
"""Accepted names of the parts."""
_ROLE_WORDS: dict[str, str] = dict.fromkeys(
    ("x", "data", "images", "image", "inputs", "input", "features", "samples", "xs"), "x"
)
_ROLE_WORDS |= dict.fromkeys(("y", "target", "targets", "label", "labels", "class", "classes", "ys"), "y")
_MOST_DEFLATION = 1100
"""Largest plausible ratio of sizes: deflate packs at most 1032 bytes into one."""


def read_npz(path: Path, *, labels: bool = True) -> dict[str, Arrays]:
    """Read inputs and labels by part, from keys such as x and y, X_train and y_train, train_images and train_labels, data
    and target; other keys are ignored.

    Args:
        path: the archive.
        labels: whether labels are required.

    Raises:
        DataError: a broken archive, one that holds Python objects, or one without such keys.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            keys = find_keys(str(path), list(members), labels=labels)
            return {
                part: Arrays(
                    _read(archive, members[x], path),
                    None if y is None else _read(archive, members[y], path),
                    source=f"{path}, {x}",
                )
                for part, (x, y) in keys.items()
            }
    except DataError:
        raise
    except Exception as error:  # a broken archive makes zipfile, zlib, ast and numpy raise some twenty kinds
        raise DataError(
            f"{path} is corrupt or no .npz archive ({type(error).__name__}: {error}); write it again"
        ) from error


def read_npy(path: Path) -> np.ndarray:
    """The array in a .npy file.

    Raises:
        DataError: it is broken, or holds Python objects.
    """
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:
        raise DataError(f"{path} is corrupt or no .npy file of plain numbers ({error}); write it again") from error


def find_keys(where: str, found: Sequence[str], *, labels: bool) -> dict[str, tuple[str, str | None]]:
    """Find the keys of inputs and labels (or None) of each part.

    Raises:
        DataError: there are none, half a pair, or two with the same meaning.
    """
    roles: dict[tuple[str, str], list[str]] = {}
    for key in found:
        if meant := _meaning(key):
            roles.setdefault(meant, []).append(key)
    parts = {part for part, _ in roles}
    twice = next((keys for keys in roles.values() if len(keys) > 1), None)
    whole = [part for part in parts if (part, "x") in roles and ((part, "y") in roles or not labels)]
    usable = "train" in whole or (not labels and len(whole) > 0)
    if twice or not usable or set(whole) != parts:
        raise DataError(
            f"{where} has the keys {', '.join(sorted(found)) or 'none'}"
            + (f", of which {' and '.join(sorted(twice))} mean the same" if twice else "")
            + "; it needs x_train and y_train, with or without x_validation and y_validation, x_test and y_test; or just x "
            "and y. Names like X, data, images and target, labels do too"
        )
    return {
        part: (roles[part, "x"][0], roles[part, "y"][0] if (part, "y") in roles else None)
        for part in PARTS
        if part in parts
    }


def _meaning(key: str) -> tuple[str, str] | None:
    """The part and the role, x or y, of a key; None for other names."""
    words = key.lower().replace("-", "_").replace(" ", "_").strip("_").split("_")
    parts = [PART_WORDS[word] for word in words if word in PART_WORDS]
    roles = [_ROLE_WORDS[word] for word in words if word in _ROLE_WORDS]
    if len(parts) > 1 or len(roles) != 1 or len(parts) + len(roles) != len(words):
        return None
    return (parts[0] if parts else "train"), roles[0]


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
