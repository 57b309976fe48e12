"""What lets one worker into a parameter server: where its shards are, and the keys of both sides."""

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
    """For one worker; whoever has it can be that worker, so it goes to nobody else, and its secret is never printed."""

    worker: int
    addresses: tuple[str, ...]
    """Of the shards, in their order."""
    server_key: str
    """The public one of the server."""
    public_key: str
    secret_key: str = field(repr=False)

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file that only its owner may read, to be carried to the worker's machine."""
        write_secret(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote; what else the file says is for others.

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
    """Whether a field of a ticket can have a value that a file gives."""
    if name == "worker":
        return type(value) is int and value >= 0
    if name == "addresses":
        return isinstance(value, list) and bool(value) and all(isinstance(address, str) for address in value)
    return isinstance(value, str)


def write_secret(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that only its owner may read, whole or not at all."""
    with replacing(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(json.dumps(content, indent=1).encode())


class Keys:
    """What a server gives out tickets from: its keys, those of its workers and its addresses, in a file where there is one.

    Args:
        path: where they are kept, and found again; None for nowhere.
        pair: makes a public and a secret key.
        addresses: where each shard listens the first time.

    Raises:
        ExchangeError: the file is of a server with another number of shards.
    """

    def __init__(self, path: Path | None, *, pair: Callable[[], tuple[bytes, bytes]], addresses: Sequence[str]) -> None:
        """Those of the file, or new ones."""
        self._path, self._pair = path, pair
        kept = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.server: tuple[str, ...] = tuple(kept.get("server") or self._new())
        self.workers: dict[str, tuple[str, ...]] = {n: tuple(keys) for n, keys in kept.get("workers", {}).items()}
        self.addresses: tuple[str, ...] = tuple(kept.get("addresses") or addresses)
        if path is not None and len(self.addresses) != len(addresses):
            raise ExchangeError(
                f"{path.parent} is of a server of {len(self.addresses)} shards, not {len(addresses)}: parameters are dealt "
                "by their number. Use the same one, or another folder"
            )

    def ticket(self, worker: int) -> Ticket:
        """Of a worker; its keys are made when it is first asked for."""
        if str(worker) not in self.workers:
            self.workers = {**self.workers, str(worker): self._new()}  # shards look into it meanwhile
            self.keep()
        return Ticket(worker, self.addresses, self.server[0], *self.workers[str(worker)])

    def whose(self, public_key: str) -> str | None:
        """The worker with this key."""
        return next((worker for worker, keys in self.workers.items() if keys[0] == public_key), None)

    def keep(self) -> None:
        """Write them to the file."""
        if self._path is not None:
            content = {"server": self.server, "workers": self.workers, "addresses": self.addresses}
            write_secret(self._path, content)

    def _new(self) -> tuple[str, str]:
        public, secret = self._pair()
        return public.decode(), secret.decode()
