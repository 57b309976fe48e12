"""The sockets of a parameter server: a thread for each shard, and a worker's sockets to all of them.

A shard knows by the key of a connection which worker it is; a client without a known key gets no reply.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from noctule.codecs import Codec
from noctule.parallel.server.handler import ShardHandler
from noctule.parallel.server.shard import Shard
from noctule.transport.sockets import Client, ServerThread, new_pair, zmq
from noctule.transport.ticket import Keys, Ticket

_FRAMES = 1 << 17
"""The largest number of frames of a request."""


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

    In a folder it keeps its keys, addresses and snapshots, and continues from them when it is started again; workers connect again
    and send what the last snapshot did not have.

    Args:
        optimizer: makes the optimizer of a shard, such as ``partial(torch.optim.Adagrad, lr=0.05)``.
        shards: the number of shards, to which the parameters are assigned.
        workers: how many must have joined before any may run.
        codec: how gradients are encoded; the same as the workers'.
        host: the address of this machine on which workers reach it.
        port: the port of the first shard; the other shards have the next ones. None for any that are free.
        snapshot_every: the number of pushes from one snapshot of a shard to the next; workers keep their pushes until then.
        patience_seconds: other workers do not wait for one that is silent for longer; more than its longest step takes.
        max_bytes: the largest message.

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
    """A parameter server that is running; `serve` makes it."""

    def __init__(
        self, shards: Sequence[Shard], *, folder: Path | None, addresses: Sequence[str], max_bytes: int, **options: Any
    ) -> None:
        self.shards = list(shards)
        path = None if folder is None else folder / "keys.json"
        self._keys = Keys(path, pair=new_pair, addresses=addresses)
        self._threads: list[tuple[ServerThread, ShardHandler]] = []
        try:
            for index, (shard, address) in enumerate(zip(self.shards, self._keys.addresses, strict=True)):
                where = None if folder is None else folder / f"shard-{index}"
                handler = ShardHandler(shard, folder=where, max_bytes=max_bytes, **options)
                thread = ServerThread(handler, address, self._keys, max_bytes=max_bytes, frames=_FRAMES)
                self._threads.append((thread, handler))
            self._keys.addresses = self.addresses = tuple(thread.address for thread, _ in self._threads)
            self._keys.save()
        except BaseException:
            self.close()
            raise
        for thread, _ in self._threads:
            thread.start()

    def ticket(self, worker: int) -> Ticket:
        """The ticket of a worker; the same at each call."""
        return self._keys.ticket(worker)

    @property
    def staleness(self) -> Counter[int]:
        """How many pushes, of all shards together, had each staleness."""
        return sum((Counter(dict(shard.staleness)) for shard in self.shards), Counter())

    @property
    def versions(self) -> list[int]:
        """The number of pushes that are in each shard's weights."""
        return [shard.version for shard in self.shards]

    @property
    def outdated(self) -> int:
        """How many gradients of a sparse layer were left out because its connections had moved too often since."""
        return sum(shard.weights.outdated for shard in self.shards if shard.weights is not None)

    def close(self) -> None:
        """Stop, and write snapshots; a second call does nothing."""
        for thread, handler in self._threads:
            thread.end()
            if thread.ident is not None:  # it was started, and may have answered a worker
                handler.close()
        self._threads = []

    def __enter__(self) -> Self:
        """Return this server."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Show the addresses; no keys."""
        return f"Server({', '.join(self.addresses)})"


class ShardSockets:
    """A worker's sockets to all shards.

    Raises:
        ExchangeError: the ticket's keys or addresses are not valid.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._clients: list[Client] = []
        self._poller = zmq.Poller()
        try:
            for address in ticket.addresses:
                self._clients.append(Client(ticket, address))
                self._poller.register(self._clients[-1].socket, zmq.POLLIN)
        except BaseException:
            self.close()
            raise

    def send(self, shard: int, frames: Sequence[bytes]) -> None:
        """Send to a shard in the background; drop the message if the queue is full."""
        self._clients[shard].send(frames)

    def receive(self, seconds: float) -> list[tuple[int, list[bytes]]]:
        """The messages that have come, each with its shard, after a wait of at most so many seconds."""
        ready = dict(self._poller.poll(max(0, int(1000 * seconds))))
        sockets = [client.socket for client in self._clients]
        return [(shard, socket.recv_multipart()) for shard, socket in enumerate(sockets) if socket in ready]

    def close(self) -> None:
        """Disconnect; what was not sent is dropped."""
        for client in self._clients:
            client.close()
