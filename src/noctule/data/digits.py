"""The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: a data set without a download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from noctule.core.errors import DataError
from noctule.data.dataset import Dataset

_WHITEST = 16


def read_digits() -> dict[str, Dataset]:
    """All digits as one train part, pixels scaled to 0 .. 1."""
    found = find_spec("sklearn")  # the package is not imported, which takes two seconds
    if found is None or found.origin is None:
        raise DataError("digits is part of scikit-learn, which is missing: pip install scikit-learn")
    path = Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",")
    except (OSError, ValueError) as error:
        raise DataError(f"digits should be in {path}, a file of scikit-learn: install scikit-learn again") from error
    inputs, labels = torch.from_numpy(table[:, :-1] / _WHITEST), torch.from_numpy(table[:, -1].astype(np.int64))
    return {"train": Dataset(inputs, labels, name="digits", classes=10, shape=(8, 8))}
