"""Reading of plain or gzipped files with a limit of bytes, and checks of their contents."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from noctule.core.errors import DataError

_PIECE_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"


@contextmanager
def open_content(path: Path, *, remedy: str = "fetch or write it again") -> Iterator[BinaryIO]:
    """Open a file and gunzip it if its first bytes are those of gzip; a broken file raises DataError."""
    try:
        with open(path, "rb") as raw:
            gzipped = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if gzipped else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is corrupt or cut short ({error}); {remedy}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_at_most(stream: BinaryIO, count: int) -> bytearray:
    """The next `count` bytes, or fewer where the stream ends; memory grows with what is there, not with `count`."""
    content = bytearray()
    while len(content) < count and (piece := stream.read(min(_PIECE_BYTES, count - len(content)))):
        content += piece
    return content


def read_checked(path: Path, *, content_bytes: int, sha256: str, remedy: str) -> bytearray:
    """The content of a file (after gunzip) with a check of its length and checksum.

    Raises:
        DataError: they differ; with the file, the expected and the actual values and the `remedy`.
    """
    with open_content(path, remedy=remedy) as stream:
        content = read_at_most(stream, content_bytes + 1)
    found = hashlib.sha256(content).hexdigest()
    if len(content) > content_bytes:
        raise DataError(f"{path} holds more than the expected {content_bytes} bytes of content; {remedy}")
    if found != sha256:
        raise DataError(
            f"{path} is corrupt or another file: expected {content_bytes} bytes of content with sha256 {sha256}, "
            f"got {len(content)} bytes with {found}; {remedy}"
        )
    return content
