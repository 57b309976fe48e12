"""One worker's part of every batch: all parts together are the batch that one worker alone would have."""

from collections.abc import Iterator

from torch import Tensor

from noctule.data import Batches
from noctule.exchange import Weigh
from noctule.team.member import Team


class Share:
    """The batches of one member of a team, cut anew whenever the team changes.

    A batch of fewer samples than workers leaves some workers without: they get its first sample, with a weight of zero.

    Args:
        batches: of all workers together.
        team: says the number of the worker and how many there are.
        weigh: gets the number of samples of each part; None where `counts` is read instead.
    """

    counts = 1.0
    """The weight of the last part's mean beside those of the other workers, 1 on average."""

    def __init__(self, batches: Batches, team: Team, weigh: Weigh | None = None) -> None:
        self.batches, self.team, self.weigh = batches, team, weigh

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's parts of the batches of one epoch, from batch number ``start`` on."""
        world, size, samples = self.team.world, self.batches.batch_size, len(self.batches.dataset)
        parts = self.batches.epoch(epoch, start, part=(self.team.rank, world))
        for batch, (inputs, targets) in enumerate(parts, start):
            if batch > start or not batch:  # a training that resumes may have a failed meeting to retry first
                self.team.before_batch(epoch * len(self) + batch, first=not batch)
            self.counts = len(inputs) * world / min(size, samples - batch * size)
            if self.weigh is not None:
                self.weigh.n = float(len(inputs))
            if not len(inputs):
                inputs, targets = (x[:1] for x in next(self.batches.epoch(epoch, batch)))
            yield inputs, targets
