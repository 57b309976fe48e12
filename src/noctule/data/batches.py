"""Mini-batches whose order and augmentation are functions of seed, epoch and position alone, so that a run can resume anywhere."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from noctule.core.random import generator
from noctule.data.augment import Augment
from noctule.data.dataset import Dataset
from noctule.data.text import Windows


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a data set, epoch by epoch.

    With `shuffle` every epoch is a fresh permutation; without, the samples come in their own order. The last batch is
    shorter where the samples do not divide, or is left out with `drop_last`. `augment` is given each batch in the shape
    of its samples, (B, *shape), and a generator of that batch's own.

    >>> toy = Dataset(torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 0]), name="toy", classes=2)
    >>> [len(targets) for _, targets in Batches(toy, 2, seed=0).epoch(0)]
    [2, 2, 1]
    """

    dataset: Dataset | Windows
    batch_size: int
    _: KW_ONLY
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    augment: Augment | None = None

    def __post_init__(self) -> None:
        """Refuse what gives no batches."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if not len(self):
            raise ValueError(
                f"no batch at all: data set {self.dataset.name!r} has {len(self.dataset)} samples, fewer than "
                f"batch_size={self.batch_size}, and drop_last leaves out the rest; give a smaller batch_size"
            )

    def __len__(self) -> int:
        """The batches of an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start: int = 0, *, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from batch number `start` on: inputs (B, features) and targets (B, ...), both copies.

        Args:
            part: (k, W): the k-th of W parts of every batch only, which may be empty.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start must lie between 0 and the {len(self)} batches of an epoch, not {start}")
        if not 0 <= part[0] < part[1]:
            raise ValueError(f"part must be (k, W) with k from 0 to W - 1, not {part}")
        return self._gather(epoch, start, *part)

    def order(self, epoch: int) -> Tensor:
        """The row numbers of one epoch in the order they are used, (samples,) int64."""
        if not self.shuffle:
            return torch.arange(len(self.dataset))
        return torch.randperm(len(self.dataset), generator=generator(self.seed, epoch))

    def _gather(self, epoch: int, start: int, k: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.dataset.inputs, self.dataset.targets
        order = self.order(epoch).to(inputs.device)
        for batch in range(start, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            mine = slice(k * len(rows) // parts, (k + 1) * len(rows) // parts)
            if self.augment is None:
                yield inputs.index_select(0, rows[mine]), targets.index_select(0, rows[mine])
            else:  # of the whole batch, so that each sample is changed alike however many parts there are
                changed = self._augmented(self.augment, inputs.index_select(0, rows), epoch, batch)
                yield changed[mine].clone(), targets.index_select(0, rows[mine])

    def _augmented(self, augment: Augment, inputs: Tensor, epoch: int, batch: int) -> Tensor:
        samples = inputs if self.dataset.shape is None else inputs.view(-1, *self.dataset.shape)
        changed = augment(samples, generator(self.seed, epoch, batch))
        if changed.shape != samples.shape:
            raise ValueError(
                f"augment made {tuple(changed.shape)} of a batch of shape {tuple(samples.shape)}; it must keep the shape"
            )
        return changed.flatten(1)
