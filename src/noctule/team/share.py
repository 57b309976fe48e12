"""One worker's part of every batch: all parts together are the batch that one worker alone would have."""

from collections.abc import Iterator

from torch import Tensor

from noctule.data import Batches
from noctule.exchange import Weigh
from noctule.team.member import Team


class Share:
    """The part of a team's member, cut anew whenever the team is another one.

    A batch with fewer samples than workers leaves some without: they get its first sample, which counts for nothing.

    Args:
        batches: of all workers together.
        team: who takes them.
        weigh: is told how many samples each part has; None where `counts` is asked instead.
    """

    counts = 1.0
    """What the mean over the last part counts beside those of the others', 1 on average."""

    def __init__(self, batches: Batches, team: Team, weigh: Weigh | None = None) -> None:
        """Nothing is read yet."""
        self.batches, self.team, self.weigh = batches, team, weigh

    def __len__(self) -> int:
        """The batches of an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's parts of the batches of one epoch, from batch number ``start`` on."""
        world, size, samples = self.team.world, self.batches.batch_size, len(self.batches.dataset)
        parts = self.batches.epoch(epoch, start, part=(self.team.rank, world))
        for batch, (inputs, targets) in enumerate(parts, start):
            if batch > start or not batch:  # one that resumes may have a meeting to make up for first
                self.team.before_batch(epoch * len(self) + batch, first=not batch)
            self.counts = len(inputs) * world / min(size, samples - batch * size)
            if self.weigh is not None:
                self.weigh.n = float(len(inputs))
            if not len(inputs):
                inputs, targets = (x[:1] for x in next(self.batches.epoch(epoch, batch)))
            yield inputs, targets
