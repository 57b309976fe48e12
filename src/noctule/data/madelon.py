"""Madelon, the artificial feature-selection set of the NIPS 2003 challenge (Guyon): 20 of its 500 features matter."""

from io import BytesIO
from pathlib import Path

import numpy as np

from noctule.data.arrays import make_parts
from noctule.data.dataset import Dataset
from noctule.data.published import Published, PublishedFile, read_published

MADELON = Published(
    "madelon",
    "https://archive.ics.uci.edu/ml/machine-learning-databases/madelon/",
    (
        PublishedFile(
            "MADELON/madelon_train.data",
            4_001_995,
            "0b6e37711efdc7ab74250c51e7d6966bffd9f8f2b0e9971e882c3a7a380c2314",
        ),
        PublishedFile(
            "MADELON/madelon_train.labels",
            5_000,
            "10bffcc3b017467cb810d326b931951adcbde2b4870faf981da2991993b48689",
        ),
        PublishedFile(
            "MADELON/madelon_valid.data",
            1_200_599,
            "cb9a46475147de1a58d9f15ef4c318e5b85de344e0f9ab92626fa446aa815dc9",
        ),
        PublishedFile(
            "madelon_valid.labels",
            1_499,
            "1aa311db914031ce44fc1dcf00fe4a0c31becb6c5c4e809db7fec13eead58fcc",
        ),
    ),
)


def read_madelon(*, data_dir: Path | None = None, mirror: str | None = None) -> dict[str, Dataset]:
    """The 2,000 train samples, and the challenge's 600 validation samples as the test part; labels -1, +1 are 0, 1.

    The test samples of the challenge were published without labels and are not used.
    """
    tables = [np.loadtxt(BytesIO(content)) for content in read_published(MADELON, data_dir=data_dir, mirror=mirror)]
    train, train_labels, test, test_labels = tables
    return make_parts({"train": (train, train_labels > 0), "test": (test, test_labels > 0)}, name="madelon")
