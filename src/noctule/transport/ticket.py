"""Tickets, with which a worker connects to a server, and the keys that a server makes them from."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from noctule.checkpoint.atomic import replacing
from noctule.core.errors import ExchangeError


@dataclass(frozen=True)
class Ticket:
    """The addresses of a server and the keys of one worker.

    Its holder can act as that worker, so keep it secret; the secret key is never printed.
    """

    worker: int
    addresses: tuple[str, ...]
    """The address of each shard, in order."""
    server_key: str
    """The public key of the server."""
    public_key: str
    secret_key: str = field(repr=False)

    def save(self, path: str | os.PathLike) -> None:
        """Write the ticket to a file that only its owner may read, to be copied to the worker's machine."""
        write_secret(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read the ticket in a file; the file may hold more than that.

        Raises:
            ValueError: the file holds no ticket.
        """
        try:
            found = json.loads(Path(path).read_text())
            kept = {each.name: found[each.name] for each in fields(cls)}
            for name, value in kept.items():
                if not _fits(name, value):
                    raise TypeError(f"its {name} cannot be one")  # without the value, which may be the secret
            return cls(**{**kept, "addresses": tuple(kept["addresses"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no ticket: write one with server.ticket(worker).save(path)") from error


def _fits(name: str, value: Any) -> bool:
    """Whether a value from a file is valid for a field of a ticket."""
    if name == "worker":
        return type(value) is int and value >= 0
    if name == "addresses":
        return isinstance(value, list) and bool(value) and all(isinstance(address, str) for address in value)
    return isinstance(value, str)


def write_secret(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that only its owner may read, completely or not at all."""
    with replacing(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(json.dumps(content, indent=1).encode())


class Keys:
    """The keys of a server and of its workers, and its addresses; read from a file if it exists.

    Args:
        path: the file in which they are kept; None for none.
        pair: makes a public and a secret key.
        addresses: the address of each shard, for a server without a file.

    Raises:
        ExchangeError: the file is of a server with another number of shards.
    """

    def __init__(self, path: Path | None, *, pair: Callable[[], tuple[bytes, bytes]], addresses: Sequence[str]) -> None:
        self._path, self._pair = path, pair
        kept = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.server: tuple[str, ...] = tuple(kept.get("server") or self._new())
        self.workers: dict[str, tuple[str, ...]] = {n: tuple(keys) for n, keys in kept.get("workers", {}).items()}
        self.addresses: tuple[str, ...] = tuple(kept.get("addresses") or addresses)
        if path is not None and len(self.addresses) != len(addresses):
            raise ExchangeError(
                f"{path.parent} is of a server of {len(self.addresses)} shards, not {len(addresses)}: parameters are "
                "assigned by their number. Use the same one, or another folder"
            )

    def ticket(self, worker: int) -> Ticket:
        """The ticket of a worker; its keys are made at the first call."""
        if str(worker) not in self.workers:
            self.workers = {**self.workers, str(worker): self._new()}  # server threads read it meanwhile
            self.save()
        return Ticket(worker, self.addresses, self.server[0], *self.workers[str(worker)])

    def worker_of(self, public_key: str) -> str | None:
        """The worker that a public key belongs to; None for an unknown key."""
        return next((worker for worker, keys in self.workers.items() if keys[0] == public_key), None)

    def save(self) -> None:
        """Write the file, if there is one."""
        if self._path is not None:
            content = {"server": self.server, "workers": self.workers, "addresses": self.addresses}
            write_secret(self._path, content)

    def _new(self) -> tuple[str, str]:
        public, secret = self._pair()
        return public.decode(), secret.decode()
