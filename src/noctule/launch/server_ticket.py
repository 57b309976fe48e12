"""The file that lets a worker on any machine train at a server: its ticket, the number of workers, and their strategy."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypeVar

from noctule.core.errors import UsageError
from noctule.team.member import UNTRAINED, as_member_of
from noctule.team.strategies import made
from noctule.team.strategy import ServedStrategy
from noctule.transport.ticket import Ticket, write_secret

T = TypeVar("T")
WAIT_SECONDS = 600.0
"""The wait for a server that is being restarted, and for workers that have not come yet."""


@dataclass(frozen=True)
class ServerTicket:
    """The ticket of one worker and how it trains; its file holds the worker's secret."""

    ticket: Ticket
    workers: int
    strategy: ServedStrategy

    def save(self, path: Path) -> None:
        """Write it to a file that only its owner may read, to be copied to the worker's machine; `Ticket.load` reads it too."""
        write_secret(path, asdict(self.ticket) | {"workers": self.workers, "strategy": self.strategy.facts()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no such ticket, or its strategy cannot be.
        """
        ticket, found = Ticket.load(path), json.loads(path.read_text())
        workers, facts = found.get("workers"), found.get("strategy")
        if type(workers) is not int or workers < 1 or not isinstance(facts, dict):
            raise ValueError(
                f"{path} does not say how many workers there are and how they train: take one that `noctule server` wrote"
            )
        try:
            strategy = made(facts)
        except UsageError as error:
            raise ValueError(
                f"{path} names a strategy that cannot be: {error}. Copy it from the server again"
            ) from error
        if not isinstance(strategy, ServedStrategy) or strategy.needs_supervisor:
            raise ValueError(f"{path} names the strategy {strategy.name}, which `noctule server` does not serve")
        return cls(ticket, workers, strategy)

    def __str__(self) -> str:
        """The number of the worker and the server's addresses; no keys."""
        return f"worker {self.ticket.worker} of {self.workers} at {', '.join(self.ticket.addresses)}"

    def take_part(self, training: Callable[[], T]) -> T:
        """Run a training as this worker.

        Raises:
            ExchangeError: the server refuses the ticket, or has not answered for `WAIT_SECONDS`.
            UsageError: the training does not ask its team how to train.
        """
        from noctule.transport.reach import check_ticket

        check_ticket(self.ticket)
        own = self.strategy.team(self.ticket, workers=self.workers, timeout_seconds=WAIT_SECONDS)
        with as_member_of(own) as team:
            result = training()
        if not team.trained and self.workers > 1:
            raise UsageError(UNTRAINED)
        return result
