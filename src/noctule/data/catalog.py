"""The built-in data sets by name, and the function that loads them or the user's own data."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from noctule.core.errors import DataError, UsageError
from noctule.data.dataset import Dataset
from noctule.data.digits import read_digits
from noctule.data.folder import KINDS, read_path
from noctule.data.madelon import read_madelon
from noctule.data.mnist import FASHION_MNIST, MNIST, read_pictures
from noctule.data.names import DataSource, names
from noctule.data.objects import read_object
from noctule.data.preparation import Preparation, Samples, fit_preparation
from noctule.data.prepare import prepare, with_fingerprint
from noctule.data.splits import Splits, split
from noctule.data.target import Target, Task

_SOURCES = {
    "digits": lambda **_: read_digits(),
    "fashion-mnist": lambda **where: read_pictures(FASHION_MNIST, **where),
    "madelon": read_madelon,
    "mnist": lambda **where: read_pictures(MNIST, **where),
}

assert tuple(sorted(_SOURCES)) == names


def load(
    name_or_path: DataSource,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    validation_fraction: float = 0.1,
    mirror: str | None = None,
    target: str | None = None,
    task: Task = "auto",
) -> Splits:
    """Load a built-in data set, or the user's own data, as train, validation and test.

    Text, dates, booleans and missing values of a table become numbers by `Splits.preparation`, which is learnt from
    the training part alone.

    Args:
        name_or_path: one of `names`, or else a path: a CSV, Parquet, .npz or .npy file, or a folder of such, of idx
            files, or of pictures in a folder for each class. A `pathlib.Path` is always a path. Or data in memory: a
            DataFrame, a Hugging Face Dataset, (X, y), a dict of columns or of parts, a `Dataset`.
        data_dir: where to look for a built-in set first; then come the folder in the environment variable
            NOCTULE_DATA and the cache, ~/.cache/noctule or $XDG_CACHE_HOME/noctule, where downloads go.
        seed: of the cut between train and validation.
        validation_fraction: of the train part, where the data bring no validation part of their own; 0 for none. Where
            they bring no test part a fifth of the samples becomes one, the same for every seed.
        mirror: the address of another server that has the published files in the same folders.
        target: the column of a table that is to be predicted (default: one called label, target, class or y, or else
            the last).
        task: whether the target is classes or a number (default: text and few whole numbers are classes).

    Raises:
        UsageError: no such name, path or column, `data_dir` is no folder, or a fraction outside [0, 1).
        DataError: data that are missing, corrupt, empty or not what they should be.

    >>> load("digits").train
    Dataset('digits', samples=1258, features=64, classes=10, shape=(8, 8))
    """
    found = read(name_or_path, data_dir=None if data_dir is None else Path(data_dir), mirror=mirror)
    parts = found.parts
    if all(isinstance(part, Dataset) for part in parts.values()):
        return _of_data_sets(parts, found.name, target, task, validation_fraction, seed)  # type: ignore[arg-type]
    try:
        return prepare(
            parts, name=found.name, validation_fraction=validation_fraction, seed=seed, target=target, task=task
        )
    except DataError as error:
        if found.path is None or str(found.path) in str(error):
            raise
        raise DataError(f"{found.path}: {error}") from error


class RawData(NamedTuple):
    """Samples by part as they were read, the name of the data set, and the path of the user's own file or folder."""

    parts: Mapping[str, Samples]
    name: str
    path: Path | None


def read(
    source: DataSource, *, data_dir: Path | None = None, mirror: str | None = None, like: Preparation | None = None
) -> RawData:
    """Read the samples of a name, a path or an object, without any preparation.

    Args:
        source: as `load` takes it.
        data_dir: the first folder that is searched for built-in sets.
        mirror: of the published files.
        like: the preparation of a model that predicts these samples; they may lack labels.
    """
    if isinstance(source, Splits):
        parts = {part: getattr(source, part) for part in ("train", "validation", "test")}
        return RawData({part: each for part, each in parts.items() if each is not None}, source.train.name, None)
    if not isinstance(source, str | os.PathLike):
        name = source.name if isinstance(source, Dataset) else "own data"
        return RawData(read_object(source, labels=like is None), name, None)
    if isinstance(source, str) and source in _SOURCES:
        return RawData(_SOURCES[source](data_dir=data_dir, mirror=mirror), source, None)
    path = Path(source).expanduser()
    if str(source) and (path.is_dir() or path.is_file()):
        return RawData(read_path(path, like=like), path.stem if path.is_file() else path.resolve().name, path)
    near = difflib.get_close_matches(str(source).lower().replace("_", "-"), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UsageError(
        f"there is no data set, file or folder called {str(source)!r}{hint} "
        f"Built-in sets: {', '.join(names)}; or give the path of your own data: {KINDS}"
    )


def _of_data_sets(
    parts: Mapping[str, Dataset], name: str, target: str | None, task: Task, validation: float, seed: int
) -> Splits:
    """Splits of data sets that need no preparation."""
    train = parts["train"]
    found = "classification" if train.classes else "regression"
    if target is not None or task not in ("auto", found):
        raise UsageError(
            f"{name} has no columns and is a {found}: leave out {'target' if target is not None else 'task'}"
        )
    made = split(train, validation=parts.get("validation", validation), test=parts.get("test", 0.2), seed=seed)
    preparation = fit_preparation(made.train, Target("label", labels=tuple(range(train.classes))), name=name)
    made = replace(made, preparation=preparation)
    return made if name in names else with_fingerprint(made)  # built-in sets are checked by the reader
