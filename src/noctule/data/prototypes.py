"""An endless synthetic data set: noisy copies of one random prototype per class, generated batch by batch."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from noctule.core.random import generator


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """Batches that are a function of (seed, part, number) alone; only the prototypes stay in memory.

    A sample is the prototype of its class (features of -1 and 1) plus normal noise, scaled to unit variance. A single
    feature holds almost no information: a network must add up many of them.

    Args:
        features: numbers in a sample.
        classes: how many prototypes, all equally likely.
        noise: standard deviation of the noise on each feature.
        seed: of the prototypes and of all batches.

    >>> data = Prototypes(features=1000, classes=3, seed=0)
    >>> inputs, targets = data.batch("train", 7, 4)
    >>> inputs.shape, targets.shape, bool((data.batch("train", 7, 4)[0] == inputs).all())
    (torch.Size([4, 1000]), torch.Size([4]), True)
    """

    features: int = 65_536
    classes: int = 10
    noise: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features < 1 or self.classes < 2:
            raise ValueError(f"there must be a feature and two classes at least, got {self.features}, {self.classes}")
        if not 0.0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be a finite number of at least 0, got {self.noise}")

    def batch(self, part: str, number: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, features) and targets (B,) of one batch of a part ("train", "test", ...): B = size."""
        if size < 1 or number < 0:
            raise ValueError(f"size must be at least 1 and number at least 0, got {size} and {number}")
        draws = generator(self.seed, part, number, size)
        targets = torch.randint(self.classes, (size,), generator=draws, device="cpu")
        inputs = torch.randn(size, self.features, generator=draws, device="cpu").mul_(self.noise)
        inputs += self._prototypes[targets]
        return inputs.div_((1.0 + self.noise**2) ** 0.5), targets

    @cached_property
    def _prototypes(self) -> Tensor:
        """(classes, features) of -1 and 1, in one byte each."""
        shape = (self.classes, self.features)
        signs = torch.randint(2, shape, generator=generator(self.seed, "prototypes"), dtype=torch.int8, device="cpu")
        return signs * 2 - 1
