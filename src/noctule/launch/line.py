"""A line between a supervisor and one process of its: JSON objects, one a line, on a socket."""

import json
import socket
from contextlib import suppress
from typing import Any


class Line:
    """One end; the other end's death is heard as the end of the words."""

    def __init__(self, end: socket.socket) -> None:
        """Of a connected stream socket."""
        self.socket = end
        self._begun = b""
        self.ended = False
        """Whether nothing more will come."""

    def tell(self, **words: Any) -> None:
        """Say something; nobody may be there any longer to hear it."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(words).encode() + b"\n")

    def hear(self) -> list[dict[str, Any]]:
        """What has come, waiting for at least something; nothing once the other end is gone."""
        while not self.ended:
            try:
                said = self.socket.recv(1 << 16)
            except OSError:
                said = b""
            if not said:
                self.ended = True
                break
            *lines, self._begun = (self._begun + said).split(b"\n")
            if lines:
                return [json.loads(line) for line in lines]
        return []

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
