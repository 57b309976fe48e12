"""What answers requests: a plain object without sockets, which a `ServerThread` calls."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Reply(NamedTuple):
    """An answer to a client."""

    route: bytes
    """The address of the client's connection, as its request had it."""
    frames: list[bytes]
    """The message."""


class Handler(Protocol):
    """Answers requests, at once or later."""

    @property
    def busy(self) -> bool:
        """True while a client waits for a reply that the passing of time may bring: `tick` is then called more often."""
        ...

    def handle(self, worker: int, route: bytes, frames: Sequence[bytes]) -> list[Reply]:
        """Take a request; the replies that can be sent now, to this worker and to others that waited."""
        ...

    def tick(self) -> list[Reply]:
        """Do what is due, such as timeouts; the replies that can be sent now."""
        ...
