"""What a recipe asks of the place where it runs: a process by itself, or a worker of several.

A recipe is written once, against `team`:

    here = team()
    fitted = here.train(
        lambda: fit(model, optimizer, here.share(batches), methods=methods, journal=here.journal(journal), ...)
    )

In a process by itself all of that changes nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from noctule.core.method import Method
from noctule.data import Batches
from noctule.sparse.rewire import Rewire
from noctule.train.fit import Journal, Loss, Source

T = TypeVar("T")
UNTRAINED = (
    "this recipe does not ask noctule.team.member() how to train, so each worker trained by itself: train it with one worker, or "
    "share the batches out as docs/how_to_use/several_workers.md says"
)


class Team:
    """A process that trains by itself; subclasses are workers among others."""

    rank = 0
    """The number of this worker."""
    world = 1
    """The number of workers now."""
    alone = True
    """Whether there are no other workers."""
    one_machine = True
    """Whether all workers are on this machine, with their records in one folder."""
    many_models = True
    """Whether one model after the other can be trained."""
    trained = False
    """Whether `train` was called: a recipe that never does trains each worker by itself."""

    def share(self, batches: Batches, *, loss_fn: Loss | None = None) -> Source:
        """This worker's part of every batch.

        Args:
            batches: of all workers together.
            loss_fn: of the recipe; needed by strategies that compute the loss of several batches in one step.
        """
        return batches

    def before_batch(self, step: int, *, first: bool) -> None:
        """A hook that the batches of `share` call before each batch.

        Args:
            step: how many batches of the training come before this one.
            first: whether it is the first of its epoch.
        """

    def methods(self, *, steps: int) -> Sequence[Method]:
        """The methods that keep the workers together in a training of so many steps: the last ones to attach, after `rewire`."""
        return ()

    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        """The `Rewire` of this worker; none where another worker moves connections for all."""
        return (Rewire(every=every, **options),)

    def journal(self, journal: Journal, *, steps: int) -> Journal:
        """The journal for this worker's records and checkpoints in a training of so many steps."""
        return journal

    def facts(self) -> dict[str, Any]:
        """Entries for this worker's records, besides bytes and seconds."""
        return {}

    def train(self, training: Callable[[], T]) -> T:
        """Run a training that resumes from its journal by itself; called again when a worker is lost, to resume with the others."""
        self.trained = True
        return training()


_alone = Team()
_here = _alone


def team() -> Team:
    """The team of this process."""
    return _here


@contextmanager
def as_member_of(other: Team) -> Iterator[Team]:
    """A block in which `team` returns this team."""
    global _here
    before, _here = _here, other
    try:
        yield other
    finally:
        _here = before
