"""Train, validation and test sets that belong together, and the function that cuts them from one set."""

from dataclasses import dataclass

import torch
from torch import Tensor

from noctule.data.dataset import Dataset
from noctule.errors import DataError, UsageError

_TEST_SEED = 20_100_617
"""Fixed, so that runs with different seeds are compared on one and the same test set."""


@dataclass(frozen=True)
class Splits:
    """Three sets with the same features and classes: fit on `train`, choose on `validation`, read `test` once."""

    train: Dataset
    validation: Dataset
    test: Dataset

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        for part in ("validation", "test"):
            for what in ("features", "classes"):
                given, wanted = getattr(getattr(self, part), what), getattr(self.train, what)
                if given != wanted:
                    raise DataError(
                        f"data set {self.train.name!r}: {part} has {given} {what} but train has {wanted}; "
                        "every part needs the same columns and the same classes"
                    )


def split(dataset: Dataset, *, validation: float | Dataset = 0.1, test: float | Dataset = 0.2, seed: int = 0) -> Splits:
    """Cut a set into train, validation and test; a class has the same share of every part, to about one sample.

    `validation` and `test` are fractions of `dataset`, or sets of their own that are kept as they are. Every sample
    lands in exactly one part, and the parts keep the order of the samples. The validation part depends on `seed`;
    the test part does not, so that runs with different seeds are judged on the same samples.

    Raises:
        UsageError: a fraction outside (0, 1).
        DataError: nothing is left to train on, or the parts do not fit together.
    """
    for what, part in (("validation", validation), ("test", test)):
        if not isinstance(part, Dataset) and not 0 < part < 1:
            raise UsageError(f"the {what} fraction must lie between 0 and 1, not {part}")
    counts = {
        what: 0 if isinstance(part, Dataset) else max(1, round(part * len(dataset)))
        for what, part in (("validation", validation), ("test", test))
    }
    if sum(counts.values()) >= len(dataset):
        raise DataError(
            f"data set {dataset.name!r} has {len(dataset)} samples: {counts['validation']} for validation and "
            f"{counts['test']} for test leave none to train on; give more samples or smaller fractions"
        )
    rest = torch.arange(len(dataset))
    if not isinstance(test, Dataset):
        test_rows, rest = _draw(rest, dataset.targets, counts["test"], seed=_TEST_SEED)
        test = dataset.take(test_rows)
    if not isinstance(validation, Dataset):
        validation_rows, rest = _draw(rest, dataset.targets, counts["validation"], seed=seed)
        validation = dataset.take(validation_rows)
    return Splits(train=dataset.take(rest), validation=validation, test=test)


def _draw(rows: Tensor, targets: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """`count` of the rows and the others, both sorted: shuffled, sorted by class, then taken at equal distances."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    by_class = shuffled[targets.cpu()[shuffled].argsort(stable=True)]
    drawn = torch.zeros(len(rows), dtype=torch.bool)
    drawn[(2 * torch.arange(count) + 1) * len(rows) // (2 * count)] = True
    return by_class[drawn].sort().values, by_class[~drawn].sort().values
