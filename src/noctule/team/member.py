"""What a training asks of where it runs: alone in its process, or one of several workers.

A recipe is written once. `team` tells it where it is:

    here = team()
    fitted = here.train(
        lambda: fit(model, optimizer, here.share(batches), methods=methods, journal=here.journal(journal), ...)
    )

Alone, all of that changes nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from noctule.core.method import Method
from noctule.data import Batches
from noctule.sparse.rewire import Rewire
from noctule.train.fit import Journal, Source

T = TypeVar("T")
UNTRAINED = (
    "this recipe does not ask noctule.team.member() how to train, so each worker trained by itself: train it with one worker, or "
    "share the batches out as docs/how_to_use/several_workers.md says"
)


class Team:
    """A worker that is alone."""

    rank = 0
    """Which of the workers this is."""
    world = 1
    """How many there are now."""
    alone = True
    """Whether there are no others."""
    one_machine = True
    """Whether all of them are on this machine, and their records in one folder."""
    many_models = True
    """Whether it can train one model after the other."""
    trained = False
    """Whether a recipe has asked it to train."""

    def share(self, batches: Batches) -> Source:
        """This worker's part of every batch."""
        return batches

    def before_batch(self, step: int, *, first: bool) -> None:
        """What `share` gives says so before each of its batches.

        Args:
            step: how many batches of the training come before it.
            first: whether it is the first of its epoch.
        """

    def methods(self, *, steps: int) -> Sequence[Method]:
        """What keeps the workers together in a training of so many steps; to be attached after all others, and after `rewire`."""
        return ()

    def rewire(self, *, every: int, **options: Any) -> Sequence[Rewire]:
        """The `Rewire` of this worker; none where another worker moves the connections for all."""
        return (Rewire(every=every, **options),)

    def journal(self, journal: Journal, *, steps: int) -> Journal:
        """Where this worker's records and checkpoints of a training of so many steps go."""
        return journal

    def facts(self) -> dict[str, Any]:
        """What its records say besides bytes and seconds."""
        return {}

    def train(self, training: Callable[[], T]) -> T:
        """Run a training that resumes by itself from its journal; where workers are lost, again from where the others are."""
        self.trained = True
        return training()


_alone = Team()
_here = _alone


def team() -> Team:
    """The team of this process."""
    return _here


@contextmanager
def as_member_of(other: Team) -> Iterator[Team]:
    """Within the block `team` gives this one."""
    global _here
    before, _here = _here, other
    try:
        yield other
    finally:
        _here = before
