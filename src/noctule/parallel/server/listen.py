"""The sockets of a parameter server: a listener for each shard, and a worker's wires to all of them.

A shard answers whoever holds a key that it has given out, and knows by the key which worker it is; anybody else gets nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from noctule.codecs import Codec
from noctule.parallel.server.protocol import Desk
from noctule.parallel.server.shard import Shard
from noctule.transport.keyed import Caller, Listener, new_pair, zmq
from noctule.transport.ticket import Keys, Ticket

_FRAMES = 1 << 17
"""A message of more frames is none: what is over is not kept."""


def serve(
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    *,
    shards: int = 1,
    workers: int = 1,
    folder: str | Path | None = None,
    codec: Codec | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    snapshot_every: int = 100,
    patience_seconds: float = 60.0,
    max_bytes: int = 1 << 30,
) -> "Server":
    """Start a parameter server, in threads of this process, until it is closed.

    With a folder it keeps its keys, addresses and snapshots there, and goes on where it was when it is started again with the same
    one; workers find it again and send what the last snapshot did not have.

    Args:
        optimizer: makes the optimizer of a shard, such as ``partial(torch.optim.Adagrad, lr=0.05)``.
        shards: among how many the parameters are dealt, by name.
        workers: how many must have joined before any may go on.
        codec: of the gradients, the same as the workers'.
        host: the address of this machine on which workers reach it.
        port: of the first shard; those of the others follow. None for any that are free.
        snapshot_every: a shard keeps its state after so many pushes; workers keep theirs until then.
        patience_seconds: a worker that is silent for longer is not waited for; longer than its longest step.
        max_bytes: of one message.

    Raises:
        ExchangeError: an address is taken, or the folder is of a server with another number of shards.
    """
    return Server(
        [Shard(optimizer, workers=workers, patience_seconds=patience_seconds) for _ in range(shards)],
        folder=None if folder is None else Path(folder),
        codec=codec,
        addresses=[f"tcp://{host}:{'*' if port is None else port + shard}" for shard in range(shards)],
        snapshot_every=snapshot_every,
        max_bytes=max_bytes,
    )


class Server:
    """Shards that listen; `serve` makes it."""

    def __init__(
        self, shards: Sequence[Shard], *, folder: Path | None, addresses: Sequence[str], max_bytes: int, **options: Any
    ) -> None:
        """Listen."""
        self.shards = list(shards)
        path = None if folder is None else folder / "keys.json"
        self._keys = Keys(path, pair=new_pair, addresses=addresses)
        self._listening: list[tuple[Listener, Desk]] = []
        try:
            for index, (shard, address) in enumerate(zip(self.shards, self._keys.addresses, strict=True)):
                where = None if folder is None else folder / f"shard-{index}"
                desk = Desk(shard, folder=where, max_bytes=max_bytes, **options)
                listener = Listener(desk, address, self._keys, max_bytes=max_bytes, frames=_FRAMES)
                self._listening.append((listener, desk))
            self._keys.addresses = self.addresses = tuple(listener.address for listener, _ in self._listening)
            self._keys.keep()
        except BaseException:
            self.close()
            raise
        for listener, _ in self._listening:
            listener.start()

    def ticket(self, worker: int) -> Ticket:
        """What a worker needs; the same each time."""
        return self._keys.ticket(worker)

    @property
    def staleness(self) -> Counter[int]:
        """How many pushes, to all shards, were how many pushes of others old."""
        return sum((Counter(dict(shard.staleness)) for shard in self.shards), Counter())

    @property
    def versions(self) -> list[int]:
        """How many pushes are in each shard."""
        return [shard.version for shard in self.shards]

    @property
    def outdated(self) -> int:
        """How many gradients of a layer were left out because its connections had changed too often since."""
        return sum(shard.weights.outdated for shard in self.shards if shard.weights is not None)

    def close(self) -> None:
        """Keep everything, and end; a second call does nothing."""
        for listener, desk in self._listening:
            listener.end()
            if listener.ident is not None:  # it has answered somebody, perhaps
                desk.close()
        self._listening = []

    def __enter__(self) -> Self:
        """This server, which listens already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Where it is; no keys."""
        return f"Server({', '.join(self.addresses)})"


class Wires:
    """A worker's sockets to all shards."""

    def __init__(self, ticket: Ticket) -> None:
        """Connect; whether anybody is there shows when it answers.

        Raises:
            ExchangeError: the ticket's keys or addresses are none.
        """
        self._callers: list[Caller] = []
        self._poller = zmq.Poller()
        try:
            for address in ticket.addresses:
                self._callers.append(Caller(ticket, address))
                self._poller.register(self._callers[-1].socket, zmq.POLLIN)
        except BaseException:
            self.close()
            raise

    def send(self, shard: int, frames: Sequence[bytes]) -> None:
        """Send when it can; where too much waits already, nothing is sent."""
        self._callers[shard].send(frames)

    def receive(self, seconds: float) -> list[tuple[int, list[bytes]]]:
        """What has come from which shard, after a wait of at most so many seconds."""
        ready = dict(self._poller.poll(max(0, int(1000 * seconds))))
        sockets = [caller.socket for caller in self._callers]
        return [(shard, socket.recv_multipart()) for shard, socket in enumerate(sockets) if socket in ready]

    def close(self) -> None:
        """What was not sent is dropped."""
        for caller in self._callers:
            caller.close()
