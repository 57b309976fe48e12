"""Train, validation and test sets that belong together, and the function that splits one set into them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from noctule.core.errors import DataError, UsageError
from noctule.data.dataset import Dataset
from noctule.data.preparation import Preparation

_TEST_SEED = 20_100_617
"""Fixed, so that runs with different seeds are compared on one and the same test set."""


@dataclass(frozen=True)
class Splits:
    """Three sets with the same features and classes: fit on `train`, choose on `validation`, read `test` once.

    `validation` is None where all but the test part is for training; `preparation` is the map from samples to these
    tensors.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset
    preparation: Preparation | None = None

    def __post_init__(self) -> None:
        for part in ("validation", "test") if self.validation is not None else ("test",):
            for what in ("features", "classes"):
                given, wanted = getattr(getattr(self, part), what), getattr(self.train, what)
                if given != wanted:
                    raise DataError(
                        f"data set {self.train.name!r}: {part} has {given} {what} but train has {wanted}; "
                        "every part needs the same columns and the same classes"
                    )

    def describe(self) -> str:
        """Lines with the sizes and the preparation of the user's own data."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        sizes = [f"{len(part)} {what}" for what, part in parts.items() if part is not None]
        what = f"{self.train.classes} classes" if self.train.classes else "a number to predict"
        samples = f"{', '.join(sizes[:-1])} and {sizes[-1]} samples"
        lines = [f"{self.train.name}: {self.train.features} features, {what}, {samples}"]
        if self.validation is None:
            lines.append("no validation part: all but the test part is trained on, and the last epoch is taken")
        return "\n".join([*lines, *(self.preparation.describe() if self.preparation is not None else [])])


def split(dataset: Dataset, *, validation: float | Dataset = 0.1, test: float | Dataset = 0.2, seed: int = 0) -> Splits:
    """Split a set into train, validation and test; each class has the same share of every part, to about one sample.

    `validation` and `test` are fractions of `dataset`, or sets that stay as they are; a validation of 0
    is none. Every sample lands in exactly one part, and the parts keep the order of the samples. The validation part
    depends on `seed`; the test part does not, so that runs with different seeds are tested on the same samples.

    Raises:
        UsageError: a fraction outside [0, 1) for validation, outside (0, 1) for test.
        DataError: nothing is left to train on, or the parts do not fit together.
    """
    rows = split_rows(
        dataset.targets,
        validation=None if isinstance(validation, Dataset) else validation,
        test=None if isinstance(test, Dataset) else test,
        seed=seed,
        name=dataset.name,
    )
    if not isinstance(test, Dataset):
        test = dataset.take(rows["test"])
    if not isinstance(validation, Dataset):
        validation_part = dataset.take(rows["validation"]) if "validation" in rows else None
    else:
        validation_part = validation
    return Splits(train=dataset.take(rows["train"]), validation=validation_part, test=test)


def split_rows(
    targets: Tensor, *, validation: float | None, test: float | None, seed: int, name: str, keep: Tensor | None = None
) -> dict[str, Tensor]:
    """The sorted row numbers of the parts of `split`: train, and validation and test where a fraction is given.

    Args:
        targets: (rows,) classes, or numbers, of which each range has the same share of every part.
        keep: (rows,) bool, the rows that always stay in train.
    """
    if validation is not None and not 0 <= validation < 1:
        raise UsageError(f"the validation fraction must lie between 0 and 1, or be 0 for none, not {validation}")
    if test is not None and not 0 < test < 1:
        raise UsageError(f"the test fraction must lie between 0 and 1, not {test}")
    total = len(targets)
    counts = {
        what: max(1, round(part * total)) if part else 0 for what, part in (("validation", validation), ("test", test))
    }
    kept = torch.zeros(total, dtype=torch.bool) if keep is None else keep
    if sum(counts.values()) >= total:
        raise DataError(
            f"data set {name!r} has {total} samples: {counts['validation']} for validation and "
            f"{counts['test']} for test leave none to train on; give more samples or smaller fractions"
        )
    if sum(counts.values()) > int((~kept).sum()):
        kept = torch.zeros(total, dtype=torch.bool)
    rest, parts = (~kept).nonzero()[:, 0], {}
    for what, part_seed in (("test", _TEST_SEED), ("validation", seed)):
        if counts[what]:
            parts[what], rest = _draw(rest, targets, counts[what], seed=part_seed)
    parts["train"] = torch.cat([rest, kept.nonzero()[:, 0]]).sort().values
    return parts


def _draw(rows: Tensor, targets: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` of the shuffled rows at equal distances in the order of targets; returns them and the others, both sorted."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    by_class = shuffled[targets.cpu()[shuffled].argsort(stable=True)]
    drawn = torch.zeros(len(rows), dtype=torch.bool)
    drawn[(2 * torch.arange(count) + 1) * len(rows) // (2 * count)] = True
    return by_class[drawn].sort().values, by_class[~drawn].sort().values
