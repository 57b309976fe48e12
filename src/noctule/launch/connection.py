"""The connection between a supervisor and one of its processes: a socket that carries JSON objects, one a line."""

import json
import socket
from contextlib import suppress
from typing import Any


class Connection:
    """One end of the connection; the death of the process at the other end ends it.

    Args:
        end: a connected stream socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._partial = b""
        self.ended = False
        """Whether nothing more will come."""

    def send(self, **message: Any) -> None:
        """Send a message; nothing happens if the other end is gone."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Wait for at least one message; none once the other end is gone."""
        while not self.ended:
            try:
                received = self.socket.recv(1 << 16)
            except OSError:
                received = b""
            if not received:
                self.ended = True
                break
            *lines, self._partial = (self._partial + received).split(b"\n")
            if lines:
                return [json.loads(line) for line in lines]
        return []

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
