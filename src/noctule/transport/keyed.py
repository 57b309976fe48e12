"""Sockets whose every message is under CURVE keys: a desk that answers whoever holds a key that was given out, and its callers."""

import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from noctule.core.errors import ExchangeError
from noctule.transport.messages import HEADER_BYTES
from noctule.transport.ticket import Keys, Ticket

try:
    import zmq
    from zmq.utils import z85
except ImportError as error:
    raise ImportError("workers that talk need pyzmq: pip install 'noctule[parameter-server]'") from error

_TICK_MS, _BUSY_TICK_MS = 50, 5
"""How often a listener looks whether it is to end, and whether there is something for callers that wait."""
Letter = tuple[bytes, list[bytes]]
"""The route to a caller, and the frames of an answer to it."""


class Desk(Protocol):
    """Who reads and answers."""

    @property
    def waiting(self) -> Any:
        """True where a caller has no answer yet."""

    def handle(self, worker: int, route: bytes, frames: Sequence[bytes]) -> list[Letter]:
        """A message came."""
        ...

    def tick(self) -> list[Letter]:
        """Time has passed."""
        ...


def new_pair() -> tuple[bytes, bytes]:
    """A public and a secret key."""
    return zmq.curve_keypair()


class Listener(threading.Thread):
    """The thread in which a desk answers; anybody without a key gets nothing.

    Args:
        desk: see there.
        address: where it listens, such as ``tcp://127.0.0.1:*``.
        keys: those given out.
        max_bytes: of a frame; longer ones are cut off before memory is taken.
        frames: a message of more is cut there.

    Raises:
        ExchangeError: the address is taken.
    """

    def __init__(self, desk: Desk, address: str, keys: Keys, *, max_bytes: int, frames: int) -> None:
        """Take the address; `start` begins to answer."""
        super().__init__(daemon=True, name="noctule-listener")
        self._desk, self._keys, self._most, self._ending = desk, keys, frames, threading.Event()
        self._context = zmq.Context()
        self._doors = self._context.socket(zmq.REP)  # where libzmq asks whether a key is known
        self._doors.bind("inproc://zeromq.zap.01")
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + HEADER_BYTES)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, b"noctule")
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = (key.encode() for key in keys.server)
        _keep_alive(self._socket)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ExchangeError(
                f"cannot listen at {address}: {error}. Does another server run, from the same folder perhaps?"
            ) from error
        self.address = bytes(self._socket.last_endpoint).decode()  # pyright: ignore

    def run(self) -> None:
        """Answer, until `end`."""
        poller = zmq.Poller()
        poller.register(self._doors, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        looked = time.monotonic()
        try:
            while not self._ending.is_set():
                tick_ms = _BUSY_TICK_MS if self._desk.waiting else _TICK_MS
                ready = dict(poller.poll(tick_ms))
                if self._doors in ready:
                    self._let_in()
                letters = self._receive() if self._socket in ready else []
                if time.monotonic() - looked >= tick_ms / 1000:  # also while messages come without a pause
                    looked = time.monotonic()
                    letters += self._desk.tick()
                for route, frames in letters:
                    self._socket.send_multipart([route, *frames])  # to whoever is gone it is dropped
        finally:
            self._context.destroy(linger=1000)

    def end(self) -> None:
        """Stop answering; a second call does nothing."""
        self._ending.set()
        if self.is_alive():
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
        route, *frames = [self._socket.recv(copy=False)]
        while self._socket.getsockopt(zmq.RCVMORE):
            frame: Any = self._socket.recv(copy=False)
            if len(frames) < self._most:
                frames.append(frame)
        worker = int(route.get("User-Id"))  # pyright: ignore
        return self._desk.handle(worker, route.bytes, [frame.bytes for frame in frames])  # pyright: ignore


class Caller:
    """A worker's socket to one address of its ticket."""

    def __init__(self, ticket: Ticket, address: str) -> None:
        """Connect; whether anybody is there shows when it answers.

        Raises:
            ExchangeError: the ticket's keys or address are none.
        """
        context = zmq.Context()
        self.socket = context.socket(zmq.DEALER)
        self.close = weakref.finalize(self, _hang_up, self.socket, context)
        """What was not sent is dropped."""
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        _keep_alive(self.socket)
        try:
            self.socket.curve_serverkey = ticket.server_key.encode()
            self.socket.curve_publickey = ticket.public_key.encode()
            self.socket.curve_secretkey = ticket.secret_key.encode()
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ExchangeError(f"{ticket} leads nowhere: {error}. Let the server write another one") from error

    def send(self, frames: Sequence[bytes]) -> None:
        """Send when it can; where too much waits already, nothing is sent."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return  # whoever waits for the answer will ask again

    def receive(self, seconds: float) -> list[bytes] | None:
        """What has come, after a wait of at most so many seconds."""
        return self.socket.recv_multipart() if self.socket.poll(int(1000 * seconds)) else None


def _hang_up(socket: Any, context: zmq.Context) -> None:
    """Also of a caller that nobody closed: a context that is collected after its sockets would wait for them for ever."""
    socket.close(linger=0)
    context.term()


def _keep_alive(socket: Any) -> None:
    """A machine that vanishes is noticed within half a minute."""
    for option, value in ((zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 15), (zmq.TCP_KEEPALIVE_INTVL, 5)):
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
