"""What brings a worker on any machine to a parameter server: its ticket, how many they are, and how they train."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypeVar

from noctule.core.errors import UsageError
from noctule.team.member import UNTRAINED, as_member_of
from noctule.team.served import Apart
from noctule.team.strategy import Strategy
from noctule.transport.ticket import Ticket, write_secret

T = TypeVar("T")
WAIT_SECONDS = 600.0
"""For a server that somebody starts again, and for the workers who have not come yet."""


@dataclass(frozen=True)
class Invitation:
    """For one worker; its file holds the worker's secret."""

    ticket: Ticket
    workers: int
    strategy: Strategy

    def save(self, path: Path) -> None:
        """Write it to a file that only its owner may read, to be carried to the worker's machine; `Ticket.load` reads it too."""
        write_secret(path, asdict(self.ticket) | {"workers": self.workers, "strategy": self.strategy.facts()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is none.
        """
        ticket = Ticket.load(path)
        try:
            said = json.loads(path.read_text())
            return cls(ticket, int(said["workers"]), Strategy(**said["strategy"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not say how many workers there are and how they train: take one that `noctule server` wrote"
            ) from error

    def __str__(self) -> str:
        """Which worker it is for, and where that goes; no keys."""
        return f"worker {self.ticket.worker} of {self.workers} at {', '.join(self.ticket.addresses)}"

    def take_part(self, training: Callable[[], T]) -> T:
        """Be that worker in a training.

        Raises:
            ExchangeError: the server does not let it in, or has not answered for `WAIT_SECONDS`.
            UsageError: the training does not ask its team how to train.
        """
        from noctule.transport.reach import check_ticket

        check_ticket(self.ticket)
        with as_member_of(
            Apart(self.ticket, world=self.workers, strategy=self.strategy, timeout_seconds=WAIT_SECONDS)
        ) as team:
            result = training()
        if not team.trained and self.workers > 1:
            raise UsageError(UNTRAINED)
        return result
