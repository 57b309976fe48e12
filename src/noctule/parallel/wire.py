"""The sockets of a parameter server: pyzmq, every message under CURVE keys; the only file that knows of either.

A shard answers whoever holds a key that it has given out, and knows by the key which worker it is; anybody else gets nothing.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from noctule.codecs import Codec
from noctule.errors import ExchangeError
from noctule.parallel.desk import Desk, Letter
from noctule.parallel.messages import HEADER_BYTES
from noctule.parallel.server import Shard
from noctule.parallel.ticket import Keys, Ticket

try:
    import zmq
    from zmq.utils import z85
except ImportError as error:
    raise ImportError("a parameter server needs pyzmq: pip install 'noctule[parameter-server]'") from error

_TICK_MS = 50
"""How often a shard looks who fell silent, and whether it is to end."""
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
        host=host,
        snapshot_every=snapshot_every,
        max_bytes=max_bytes,
    )


class Server:
    """Shards that listen; `serve` makes it."""

    def __init__(
        self, shards: Sequence[Shard], *, folder: Path | None, host: str, max_bytes: int, **options: Any
    ) -> None:
        """Listen."""
        self.shards = list(shards)
        path = None if folder is None else folder / "keys.json"
        self._keys = Keys(path, pair=zmq.curve_keypair, shards=len(self.shards), address=f"tcp://{host}:*")
        self._threads: list[_Listener] = []
        try:
            for index, (shard, address) in enumerate(zip(self.shards, self._keys.addresses, strict=True)):
                where = None if folder is None else folder / f"shard-{index}"
                desk = Desk(shard, folder=where, max_bytes=max_bytes, **options)
                self._threads.append(_Listener(desk, address, self._keys, max_bytes))
            self._keys.addresses = self.addresses = tuple(thread.address for thread in self._threads)
            self._keys.keep()
        except BaseException:
            self.close()
            raise
        for thread in self._threads:
            thread.start()

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
        for thread in self._threads:
            thread.end()

    def __enter__(self) -> Self:
        """This server, which listens already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Where it is; no keys."""
        return f"Server({', '.join(self.addresses)})"


class _Listener(threading.Thread):
    """The thread of one shard: whatever comes is answered by its desk."""

    def __init__(self, desk: Desk, address: str, keys: Keys, max_bytes: int) -> None:
        super().__init__(daemon=True, name="noctule-shard")
        self._desk, self._keys, self._ending = desk, keys, threading.Event()
        self._context = zmq.Context()
        self._doors = self._context.socket(zmq.REP)  # where libzmq asks whether a key is known
        self._doors.bind("inproc://zeromq.zap.01")
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(
            zmq.MAXMSGSIZE, max_bytes + HEADER_BYTES
        )  # longer ones are cut off before memory is taken
        self._socket.setsockopt(zmq.ZAP_DOMAIN, b"noctule")
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = (key.encode() for key in keys.server)
        _keep_alive(self._socket)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ExchangeError(
                f"a shard cannot listen at {address}: {error}. Does another server run, from the same folder perhaps?"
            ) from error
        self.address = bytes(self._socket.last_endpoint).decode()  # pyright: ignore

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._doors, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        looked = time.monotonic()
        try:
            while not self._ending.is_set():
                ready = dict(poller.poll(_TICK_MS))
                if self._doors in ready:
                    self._let_in()
                if self._socket in ready:
                    self._send(self._receive())
                if time.monotonic() - looked >= _TICK_MS / 1000:
                    looked = time.monotonic()
                    self._send(self._desk.tick())
            self._desk.close()
        finally:
            self._context.destroy(linger=1000)

    def end(self) -> None:
        if self.is_alive():
            self._ending.set()
            self.join()
        else:
            self._context.destroy(linger=0)

    def _let_in(self) -> None:
        """Say of a key which worker's it is, or that it is nobody's."""
        version, request, _, _, _, mechanism, *credentials = self._doors.recv_multipart()
        worker = self._keys.whose(z85.encode(credentials[0]).decode()) if mechanism == b"CURVE" else None
        code, text = (b"400", b"unknown key") if worker is None else (b"200", b"OK")
        self._doors.send_multipart([version, request, code, text, (worker or "").encode(), b""])

    def _receive(self) -> list[Letter]:
        route, *frames = _frames(self._socket)
        return self._desk.handle(int(route.get("User-Id")), route.bytes, [frame.bytes for frame in frames])

    def _send(self, letters: list[Letter]) -> None:
        for route, frames in letters:
            self._socket.send_multipart([route, *frames])  # to whoever is gone it is dropped


class Wires:
    """A worker's sockets to all shards."""

    def __init__(self, ticket: Ticket) -> None:
        """Connect; whether anybody is there shows when it answers.

        Raises:
            ExchangeError: the ticket's keys or addresses are none.
        """
        self._context = zmq.Context()
        try:
            self._connect(ticket)
        except zmq.ZMQError as error:
            self.close()
            raise ExchangeError(f"{ticket} leads nowhere: {error}. Let the server write another one") from error

    def _connect(self, ticket: Ticket) -> None:
        self._poller = zmq.Poller()
        self._sockets = []
        for address in ticket.addresses:
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            socket.curve_serverkey = ticket.server_key.encode()
            socket.curve_publickey, socket.curve_secretkey = ticket.public_key.encode(), ticket.secret_key.encode()
            _keep_alive(socket)
            socket.connect(address)
            self._sockets.append(socket)
            self._poller.register(socket, zmq.POLLIN)

    def send(self, shard: int, frames: Sequence[bytes]) -> None:
        """Send when it can; where too much waits already, nothing is sent."""
        try:
            self._sockets[shard].send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return  # whoever waits for the answer will send it again

    def receive(self, seconds: float) -> list[tuple[int, list[bytes]]]:
        """What has come from which shard, after a wait of at most so many seconds."""
        ready = dict(self._poller.poll(max(0, int(1000 * seconds))))
        return [(n, socket.recv_multipart()) for n, socket in enumerate(self._sockets) if socket in ready]

    def close(self) -> None:
        """What was not sent is dropped."""
        self._context.destroy(linger=0)


def _frames(socket: Any) -> list[Any]:
    """The frames of one message; of too long a one, its beginning."""
    frames = [socket.recv(copy=False)]
    while socket.getsockopt(zmq.RCVMORE):
        frame = socket.recv(copy=False)
        if len(frames) < _FRAMES:
            frames.append(frame)
    return frames


def _keep_alive(socket: Any) -> None:
    """A machine that vanishes is noticed within half a minute."""
    for option, value in ((zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 15), (zmq.TCP_KEEPALIVE_INTVL, 5)):
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
