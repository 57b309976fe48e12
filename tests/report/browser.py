"""A real headless Chromium whose whole internet is one local server."""

import json
import os
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)


@dataclass(frozen=True)
class Visit:
    """What became of one visit: the page as the browser ended with it, its complaints, the addresses it asked for."""

    dom: str
    console: list[str]
    requests: list[str]


class Internet:
    """Serves `pages` (address: text) as every site there is, being the proxy; nothing is passed on."""

    def __init__(self, pages: dict[str, str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = pages.get(self.path, "").encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def proxy(self) -> str:
        """Its address."""
        return f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Internet":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def visit(address: str, pages: dict[str, str]) -> Visit:
    """Open `address` and wait until it has loaded."""
    with Internet(pages) as internet, tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        proxy = (f"--proxy-server={internet.proxy}", "--proxy-bypass-list=<-loopback>")
        done = _chromium(*proxy, f"--log-net-log={log}", "--dump-dom", address)
        events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # What the browser asks for on its own account has no origin; neither has the address it was sent to.
    asked = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Visit(done.stdout, console, asked)


def screenshot(page: Path, to: Path, *, width: int, height: int, dark: bool = False) -> None:
    """Draw a file into a PNG."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _chromium(scheme, f"--window-size={width},{height}", f"--screenshot={to}", page.as_uri())


def _chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments]
        environment = os.environ | {"HOME": profile}  # the start script of Debian writes there
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
