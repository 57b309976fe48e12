"""The data sets that have a name, and the one function that loads them or the user's own files."""

import difflib
import os
from pathlib import Path

from noctule.data.dataset import Dataset
from noctule.data.digits import read_digits
from noctule.data.folder import read_path
from noctule.data.madelon import read_madelon
from noctule.data.mnist import FASHION_MNIST, MNIST, read_pictures
from noctule.data.names import names
from noctule.data.splits import Splits, split
from noctule.errors import UsageError

_SOURCES = {
    "digits": lambda **_: read_digits(),
    "fashion-mnist": lambda **where: read_pictures(FASHION_MNIST, **where),
    "madelon": read_madelon,
    "mnist": lambda **where: read_pictures(MNIST, **where),
}

assert tuple(sorted(_SOURCES)) == names


def load(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    validation_fraction: float = 0.1,
    mirror: str | None = None,
) -> Splits:
    """Load a built-in data set, or a file or folder of the user's, as train, validation and test.

    Args:
        name_or_path: one of `names`, or else a path: a .npz or CSV file, or a folder of .npz, CSV or idx files. A
            `pathlib.Path` is always a path.
        data_dir: where to look for a built-in set first; then come the folder in the environment variable
            NOCTULE_DATA and the cache, ~/.cache/noctule or $XDG_CACHE_HOME/noctule, where downloads go.
        seed: of the cut between train and validation.
        validation_fraction: of the train part, where the data bring no validation part of their own. Where they bring
            no test part a fifth of the samples becomes one, the same for every seed.
        mirror: the address of another server that has the published files in the same folders.

    Raises:
        UsageError: no such name or path, `data_dir` is no folder, or a fraction outside (0, 1).
        DataError: data that are missing, corrupt, empty or not what they should be.

    >>> load("digits").train
    Dataset('digits', samples=1258, features=64, classes=10, shape=(8, 8))
    """
    parts = _read(name_or_path, data_dir=None if data_dir is None else Path(data_dir), mirror=mirror)
    return split(
        parts["train"],
        validation=parts.get("validation", validation_fraction),
        test=parts.get("test", 0.2),
        seed=seed,
    )


def _read(name_or_path: str | os.PathLike[str], *, data_dir: Path | None, mirror: str | None) -> dict[str, Dataset]:
    if isinstance(name_or_path, str) and name_or_path in _SOURCES:
        return _SOURCES[name_or_path](data_dir=data_dir, mirror=mirror)
    path = Path(name_or_path).expanduser()
    if path.is_dir() or path.is_file():
        return read_path(path)
    near = difflib.get_close_matches(str(name_or_path).lower().replace("_", "-"), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"there is no data set, file or folder called {str(name_or_path)!r}{hint} "
        f"Built-in sets: {', '.join(names)}; or give the path of a .npz or CSV file, "
        "or of a folder of .npz, CSV or idx files"
    )
