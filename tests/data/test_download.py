"""A download is there whole and right, or not at all: real servers, real sockets, real disks."""

import gzip
import hashlib
import os
import pty
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from noctule.core.errors import DataError
from noctule.data.download import fetch

if TYPE_CHECKING:
    from conftest import Site

CONTENT = random.Random(0).randbytes(100_000) + bytes(200_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GZIPPED = gzip.compress(CONTENT, mtime=0)


def get(address: str, folder: Path, *, timeout_seconds: float = 30.0) -> Path:
    target = folder / "new" / "file.gz"
    return fetch(
        address + "file.gz",
        target,
        content_bytes=len(CONTENT),
        sha256=SHA256,
        timeout_seconds=timeout_seconds,
    )


@pytest.mark.parametrize("body", [CONTENT, GZIPPED, gzip.compress(CONTENT, 1)], ids=["plain", "gzip", "other gzip"])
@pytest.mark.parametrize("declared", [None, -1], ids=["length", "no length"])
def test_good_content_in_any_wrapping(
    body: bytes, declared: int | None, site: "Site", tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site.put("/file.gz", body, declared=declared)
    target = get(site.address, tmp_path)
    assert target.read_bytes() == body
    assert os.listdir(target.parent) == ["file.gz"]
    assert capfd.readouterr().err == "", "no bar where nobody looks"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (
            {"body": CONTENT[:-1] + b"x"},
            f"expected 300000 bytes of content with sha256 {SHA256}, got 300000 bytes with",
        ),
        ({"body": gzip.compress(CONTENT[:-1])}, f"sha256 {SHA256}, got 299999 bytes with"),
        ({"body": gzip.compress(CONTENT + b"x")}, "holds more than the expected 300000 bytes"),
        ({"body": GZIPPED[:-500]}, "corrupt or cut short"),
        ({"body": GZIPPED[:5000] + b"12345" + GZIPPED[5005:]}, "corrupt|got 300000 bytes"),
        (
            {"body": GZIPPED[:-500], "declared": len(GZIPPED)},
            f"cut short, {len(GZIPPED) - 500} of {len(GZIPPED)} bytes came",
        ),
        ({"body": CONTENT[:1000], "declared": -1}, "got 1000 bytes"),
        ({"body": b""}, "got 0 bytes"),
        ({"body": b"<html>Log in to this network</html>"}, "got 35 bytes"),
        ({"body": bytes(400_000)}, "sends more than the 365536 bytes"),
        ({"body": bytes(400_000), "declared": -1}, "sends more than the 365536 bytes"),
        ({"body": b"", "declared": 10**15}, "sends more than the 365536 bytes"),
        ({"status": 404}, "the server answered 404 Not Found"),
        ({"status": 500}, "the server answered 500"),
    ],
)
def test_anything_else_is_refused_and_leaves_nothing(
    reply: dict[str, Any], says: str, site: "Site", tmp_path: Path
) -> None:
    site.put("/file.gz", **reply)
    with pytest.raises(DataError, match=says) as caught:
        get(site.address, tmp_path)
    assert site.address in str(caught.value)
    assert os.listdir(tmp_path / "new") == []


def test_a_bad_download_leaves_the_good_file_that_was_there(site: "Site", tmp_path: Path) -> None:
    site.put("/file.gz", GZIPPED)
    target = get(site.address, tmp_path)
    site.put("/file.gz", b"bad")
    with pytest.raises(DataError, match="got 3 bytes"):
        get(site.address, tmp_path)
    assert target.read_bytes() == GZIPPED


def test_a_silent_server_is_given_up(site: "Site", tmp_path: Path) -> None:
    site.put("/file.gz", GZIPPED, stall_seconds=20)
    with pytest.raises(DataError, match=r"the connection broke .*timed out"):
        get(site.address, tmp_path, timeout_seconds=0.2)
    assert os.listdir(tmp_path / "new") == []


def test_connection_refused(tmp_path: Path) -> None:
    with socket.socket() as bound:  # bound but not listening: nobody answers, and nobody else can take the port
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"no connection .*refused"):
            get(f"http://127.0.0.1:{bound.getsockname()[1]}/", tmp_path)


@pytest.mark.parametrize("answer", [b"", b"\x16\x03\x01 what?\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Len"])
def test_a_server_that_speaks_something_else(answer: bytes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(DataError, match=r"the connection broke|no connection|got 0 bytes"):
            get(f"http://127.0.0.1:{server.getsockname()[1]}/", tmp_path, timeout_seconds=5)
        thread.join()
    assert os.listdir(tmp_path / "new") == []


def test_what_is_no_address(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not an address|no connection"):
        get("mirror.example/", tmp_path)


def test_a_file_size_limit_leaves_no_half_file(site: "Site", tmp_path: Path) -> None:
    site.put("/file.gz", GZIPPED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot store .*file\.gz: there is no room for up to 0\.3 MB"):
            get(site.address, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "new") == []


FULL_DISK = """
import os, sys
from pathlib import Path
from noctule.data.download import fetch
from noctule.core.errors import DataError
try:
    fetch(sys.argv[1], Path(sys.argv[2]) / "file.gz", content_bytes=300000, sha256="0" * 64)
except DataError as error:
    print(error, os.listdir(sys.argv[2]))
"""


def test_a_full_disk_leaves_no_half_file(site: "Site", tmp_path: Path) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    small = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"
    if not shutil.which("unshare") or subprocess.run([*mount, small], capture_output=True).returncode:
        pytest.skip("mounting a small file system of one's own is not allowed here")
    site.put("/file.gz", GZIPPED)
    script = [sys.executable, "-c", FULL_DISK, site.address + "file.gz", str(tmp_path)]
    done = subprocess.run(
        [*mount, f'{small} && exec "$@"', "sh", *script], capture_output=True, text=True, check=True, timeout=60
    )
    assert "there is no room for up to 0.3 MB" in done.stdout, done.stderr
    assert done.stdout.endswith(" []\n"), "nothing is left"


def test_a_folder_that_cannot_be_made(site: "Site", tmp_path: Path) -> None:
    (tmp_path / "new").write_text("a file where the folder should be")
    site.put("/file.gz", GZIPPED)
    with pytest.raises(DataError, match=r"cannot store .*file\.gz: (File exists|Not a directory)"):
        get(site.address, tmp_path)


def test_on_a_terminal_there_is_a_bar(site: "Site", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.put("/file.gz", GZIPPED)
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        get(site.address, tmp_path)
        shown = screen.read(10_000).decode()
    assert re.search(rf"\rfile\.gz {len(GZIPPED):,}/{len(GZIPPED):,} B +100% .*B/s", shown)
