"""Sockets with CURVE encryption: a server thread, which answers only clients whose keys are known to it, and the client."""

import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from noctule.core.errors import ExchangeError
from noctule.transport.handler import Handler, Reply
from noctule.transport.messages import HEADER_BYTES
from noctule.transport.ticket import Keys, Ticket

try:
    import zmq
    from zmq.utils import z85
except ImportError as error:
    raise ImportError("workers that talk need pyzmq: pip install 'noctule[parameter-server]'") from error

_TICK_MS, _BUSY_TICK_MS = 50, 5
"""How often the server thread calls its handler's `tick` and looks whether it is to end; more often while a client waits."""


def new_pair() -> tuple[bytes, bytes]:
    """Make a public and a secret key."""
    return zmq.curve_keypair()


class ServerThread(threading.Thread):
    """A thread that receives requests at an address, gives them to a handler and sends its replies.

    It binds the address when it is made and answers from `start` on. A client without a known key gets no reply.

    Args:
        handler: answers the requests; it is called in this thread only.
        address: where clients connect to, such as ``tcp://127.0.0.1:*``.
        keys: the keys of the server and of its workers.
        max_bytes: the largest frame; the connection of a client that sends more is dropped before memory is taken.
        frames: the largest number of frames in a request; further ones are dropped.

    Raises:
        ExchangeError: the address is taken.
    """

    def __init__(self, handler: Handler, address: str, keys: Keys, *, max_bytes: int, frames: int) -> None:
        super().__init__(daemon=True, name="noctule-server")
        self._handler, self._keys, self._max_frames, self._ending = handler, keys, frames, threading.Event()
        self._context = zmq.Context()
        self._authentication = self._context.socket(zmq.REP)  # where libzmq asks whether a key is known (ZAP)
        self._authentication.bind("inproc://zeromq.zap.01")
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
        """Answer requests until `end` is called."""
        poller = zmq.Poller()
        poller.register(self._authentication, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        ticked = time.monotonic()
        try:
            while not self._ending.is_set():
                tick_ms = _BUSY_TICK_MS if self._handler.busy else _TICK_MS
                ready = dict(poller.poll(tick_ms))
                if self._authentication in ready:
                    self._authenticate()
                replies = self._receive() if self._socket in ready else []
                if time.monotonic() - ticked >= tick_ms / 1000:  # also while messages come without a pause
                    ticked = time.monotonic()
                    replies += self._handler.tick()
                for route, frames in replies:
                    self._socket.send_multipart([route, *frames])  # dropped if the client is gone
        finally:
            self._context.destroy(linger=1000)

    def end(self) -> None:
        """Stop and close the sockets; a second call does nothing."""
        self._ending.set()
        if self.is_alive():
            self.join()
        else:
            self._context.destroy(linger=0)

    def _authenticate(self) -> None:
        """Tell libzmq which worker a key belongs to, or that it is not known."""
        version, request, _, _, _, mechanism, *credentials = self._authentication.recv_multipart()
        worker = self._keys.worker_of(z85.encode(credentials[0]).decode()) if mechanism == b"CURVE" else None
        code, text = (b"400", b"unknown key") if worker is None else (b"200", b"OK")
        self._authentication.send_multipart([version, request, code, text, (worker or "").encode(), b""])

    def _receive(self) -> list[Reply]:
        route, *frames = [self._socket.recv(copy=False)]
        while self._socket.getsockopt(zmq.RCVMORE):
            frame: Any = self._socket.recv(copy=False)
            if len(frames) < self._max_frames:
                frames.append(frame)
        worker = int(route.get("User-Id"))  # pyright: ignore
        return self._handler.handle(worker, route.bytes, [frame.bytes for frame in frames])  # pyright: ignore


class Client:
    """A worker's connection to one address of its ticket; it is made, and made again, in the background.

    Raises:
        ExchangeError: the ticket's keys or address are not valid.
    """

    def __init__(self, ticket: Ticket, address: str) -> None:
        context = zmq.Context()
        self.socket = context.socket(zmq.DEALER)
        self.close = weakref.finalize(self, _disconnect, self.socket, context)
        """Disconnect; what was not sent is dropped."""
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
        """Send in the background; drop the message if the queue is full."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return  # without a reply the caller sends it again

    def receive(self, seconds: float) -> list[bytes] | None:
        """The next message; None if there is none within so many seconds."""
        return self.socket.recv_multipart() if self.socket.poll(int(1000 * seconds)) else None


def _disconnect(socket: Any, context: zmq.Context) -> None:
    """Close a socket and its context, in this order: a context that is garbage collected first waits for its sockets for ever."""
    socket.close(linger=0)
    context.term()


def _keep_alive(socket: Any) -> None:
    """Have TCP notice within half a minute that the other machine is gone."""
    for option, value in ((zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 15), (zmq.TCP_KEEPALIVE_INTVL, 5)):
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
