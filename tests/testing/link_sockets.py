"""Sockets of this very process in the namespaces of a network: a socket stays where it was made."""

import ctypes
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from noctule.testing.link import Network
from noctule.testing.namespaces import enter

SO_RCVBUFFORCE = 33  # of Linux; beyond the limit of the system


@contextmanager
def place_of(network: Network, rank: int) -> Iterator[None]:
    """Within the block this thread makes its sockets at the place of a worker."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    enter(network.namespaces[rank])
    try:
        yield
    finally:
        assert ctypes.CDLL(None).setns(home, 0) == 0
        os.close(home)


@contextmanager
def connection(
    network: Network, sender: int = 0, receiver: int = 1, *, seconds: float = 20.0
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection between two workers: both its ends, with a time-out."""
    with place_of(network, receiver):
        server = socket.create_server(("0.0.0.0", 0))
    with place_of(network, sender):
        near = socket.socket()
    with server, near:
        near.settimeout(seconds)
        near.connect((network.addresses[receiver], server.getsockname()[1]))
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far, _ = server.accept()
        with far:
            far.settimeout(seconds)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield near, far


class Receiving(threading.Thread):
    """Take so many bytes from a socket, and note when each piece came."""

    def __init__(self, source: socket.socket, size: int) -> None:
        super().__init__(daemon=True)
        self.source, self.size = source, size
        self.data = bytearray()
        self.times: list[tuple[float, int]] = []
        self.start()

    def run(self) -> None:
        while len(self.data) < self.size and (piece := self.source.recv(1 << 16)):
            self.data += piece
            self.times.append((time.monotonic(), len(self.data)))

    def megabits(self) -> float:
        """Mbit/s of the second half of what came, when TCP has found its speed."""
        half = next(i for i, (_, size) in enumerate(self.times) if size >= self.size / 2)
        (begin, before), (end, after) = self.times[half], self.times[-1]
        return (after - before) * 8e-6 / (end - begin)


def stream(network: Network, size: int) -> tuple[float, float]:
    """Send so many bytes over TCP: seconds from the first to leave to the last to come, and Mbit/s of the second half."""
    with connection(network) as (near, far):
        begin = time.monotonic()
        receiving = Receiving(far, size)
        near.sendall(bytes(size))
        receiving.join()
        assert len(receiving.data) == size
        return receiving.times[-1][0] - begin, receiving.megabits()


def round_trip_ms(network: Network) -> float:
    """The shortest of six round trips of one byte."""
    taken = []
    with connection(network) as (near, far):
        for _ in range(6):
            begin = time.monotonic()
            near.sendall(b"x")
            far.sendall(far.recv(1))
            near.recv(1)
            taken.append(1000 * (time.monotonic() - begin))
    return min(taken)


def datagrams_that_arrive(network: Network, count: int) -> set[int]:
    """Send so many numbers over UDP, slowly enough for every queue; those that come."""
    with place_of(network, 1):
        far = socket.socket(type=socket.SOCK_DGRAM)
    with place_of(network, 0):
        near = socket.socket(type=socket.SOCK_DGRAM)
    with near, far:
        far.bind(("0.0.0.0", 0))
        far.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        near.connect((network.addresses[1], far.getsockname()[1]))
        seen: set[int] = set()
        for start in range(0, count, 100):
            for number in range(start, min(start + 100, count)):
                near.send(number.to_bytes(4, "little") + bytes(60))
            seen |= receive_datagrams(far, quiet_seconds=0.02)
        return seen if len(seen) == count else seen | receive_datagrams(far, quiet_seconds=0.3)


def receive_datagrams(far: socket.socket, *, quiet_seconds: float) -> set[int]:
    """The numbers that come until none does for a while."""
    far.settimeout(quiet_seconds)
    seen: set[int] = set()
    with suppress(TimeoutError):
        while True:
            seen.add(int.from_bytes(far.recv(100)[:4], "little"))
    return seen
