"""The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: a data set without a download."""

import torch

from noctule.core.errors import DataError
from noctule.data.dataset import Dataset

_WHITEST = 16


def read_digits() -> dict[str, Dataset]:
    """All digits as one train part, pixels scaled to 0 .. 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits is part of scikit-learn, which is missing: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(pixels / _WHITEST)
    return {"train": Dataset(inputs, torch.from_numpy(labels), name="digits", classes=10, shape=(8, 8))}
