"""What the data tests share: a real local web server, a cache folder of their own, the real data if there are any."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    declared: int | None = None
    stall_seconds: float = 0.0


@dataclass
class Site:
    """A running server: its address, what it has been asked for, and what it has where."""

    address: str
    asked: list[str] = field(default_factory=list)
    replies: dict[str, Reply] = field(default_factory=dict)

    def put(self, path: str, body: bytes = b"", **how: object) -> None:
        """What to answer; `declared` is the Content-Length it claims (None: the true one, -1: none at all)."""
        self.replies[path] = Reply(body, **how)  # type: ignore[arg-type]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append(self.path)
            reply = here.replies.get(self.path, Reply(status=404))
            self.send_response(reply.status)
            if reply.declared != -1:
                self.send_header("Content-Length", str(len(reply.body) if reply.declared is None else reply.declared))
            self.end_headers()
            closing.wait(reply.stall_seconds)
            self.wfile.write(reply.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Site(f"http://127.0.0.1:{server.server_address[1]}/")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield here
    closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder (not made yet), with no other place to find data in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NOCTULE_DATA", raising=False)
    return tmp_path / "cache" / "noctule"


@pytest.fixture
def real_data() -> Path:
    """The folder that NOCTULE_DATA names."""
    folder = os.environ.get("NOCTULE_DATA")
    if not folder:
        pytest.skip("NOCTULE_DATA names no folder with the real data sets")
    return Path(folder)
