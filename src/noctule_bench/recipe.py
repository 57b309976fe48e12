"""What `fashion` and `memory` train, and on which data."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from noctule.core.errors import DataError, UsageError
from noctule.data import Dataset, load, standardize
from noctule.sparse.budget import erdos_renyi


@dataclass(frozen=True)
class Recipe:
    """What all rows train: a multilayer perceptron with ReLU, by SGD with momentum."""

    widths: tuple[int, ...] = (784, 1000, 1000, 1000, 10)
    weights: int = 125_685
    batch: int = 128
    dropout: float = 0.3
    learning_rate: float = 0.01
    momentum: float = 0.9
    samples: int = 60_000
    """Rows of the data."""
    data: str = "random"
    """"random", or the name or path of a data set."""
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that do not go together."""
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise UsageError(f"widths must be at least two, all above 0, got {self.widths}")
        if self.samples < self.batch:
            raise UsageError(
                f"{self.samples} samples do not fill a batch of {self.batch}: give more, or a smaller batch"
            )
        try:
            erdos_renyi(self.shapes, self.weights)
        except ValueError as error:
            raise UsageError(str(error)) from error

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of each layer."""
        return [(out, into) for into, out in pairwise(self.widths)]

    @property
    def is_default(self) -> bool:
        """Whether it has the sizes that the targets are for."""
        return (self.widths, self.weights, self.batch) == (Recipe.widths, Recipe.weights, Recipe.batch)


def find_data(recipe: Recipe) -> Recipe:
    """The same recipe with as many samples as its data set has, or with random data where that cannot be had.

    Raises:
        UsageError: the data do not fit the widths.
    """
    try:
        data = dataset_of(recipe)
    except DataError:
        return replace(recipe, data="random")
    if (data.features, data.classes) != (recipe.widths[0], recipe.widths[-1]):
        raise UsageError(
            f"{data.name} has {data.features} features and {data.classes} classes, the widths are {recipe.widths}: "
            "let them begin and end with these numbers"
        )
    return replace(recipe, samples=len(data))


@cache
def dataset_of(recipe: Recipe) -> Dataset:
    """What a recipe trains on: all rows that are not for the test, kept for the next call."""
    if recipe.data == "random":
        return random_data(recipe)
    splits = standardize(load(recipe.data, data_dir=recipe.data_dir))
    parts = [part for part in (splits.train, splits.validation) if part is not None]
    return Dataset(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.targets for part in parts]),
        name=splits.train.name,
        classes=splits.train.classes,
    )


def random_data(recipe: Recipe) -> Dataset:
    """As many random rows as a recipe says."""
    generator = torch.Generator().manual_seed(0)
    return Dataset(
        torch.randn(recipe.samples, recipe.widths[0], generator=generator),
        torch.randint(recipe.widths[-1], (recipe.samples,), generator=generator),
        name="random",
        classes=recipe.widths[-1],
    )
