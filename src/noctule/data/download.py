"""The download of one file: whole and checked, or not there at all."""

import errno
import http.client
import math
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from noctule.core.errors import DataError
from noctule.data.content import read_checked
from noctule.measure.progress import Progress

_PIECE_BYTES = 1 << 16
_GZIP_SLACK_BYTES = 1 << 16
"""What gzip may add to content that does not compress."""


def fetch(
    url: str,
    target: Path,
    *,
    content_bytes: int,
    sha256: str,
    timeout_seconds: float = 30.0,
) -> Path:
    """Download `url` to the file `target`, which appears only once its content is known to be right.

    Length and checksum are those of the content after an optional gunzip: wrappings differ between mirrors. The bytes
    go to a temporary name, are synced, checked and renamed; a terminal shows how far they are. `timeout_seconds` bounds
    each wait for the server.

    Raises:
        DataError: no connection, an HTTP error, a wrong or truncated content, a full disk. Nothing is left behind.
    """
    remedy = f"this is what {url} sent, and it is deleted: try again, or use another network or mirror"
    part = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    pieces = _pieces(url, at_most=content_bytes + _GZIP_SLACK_BYTES, timeout_seconds=timeout_seconds)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "xb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            read_checked(part, content_bytes=content_bytes, sha256=sha256, remedy=remedy)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:  # the disk's: those of the network have become DataError in _pieces
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = f"there is no room for up to {content_bytes / 1e6:.1f} MB" if full else (error.strerror or str(error))
        raise DataError(
            f"cannot store {target}: {what}; mend that, or name another folder in XDG_CACHE_HOME"
        ) from error
    return target


def _pieces(url: str, *, at_most: int, timeout_seconds: float) -> Iterator[bytes]:
    """The body of `url` as it arrives; whatever goes wrong on the network becomes a DataError."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "noctule"})
        with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
            declared = response.headers.get("Content-Length", "")
            expected = int(declared) if declared.isdecimal() else None
            received = 0
            with Progress(expected, label=url.rpartition("/")[2], unit="B", every_seconds=math.inf) as progress:
                while (expected or 0) <= at_most and (piece := response.read(_PIECE_BYTES)):
                    received += len(piece)
                    if received > at_most:
                        break
                    progress.advance(len(piece))
                    yield piece
    except urllib.error.HTTPError as error:
        raise DataError(f"{url}: the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise DataError(f"{url}: no connection ({error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: the connection broke ({str(error) or type(error).__name__})") from error
    except ValueError as error:
        raise DataError(f"{url}: not an address to download from ({error})") from error
    if max(received, expected or 0) > at_most:
        raise DataError(f"{url}: sends more than the {at_most} bytes that the right file can have")
    if expected is not None and received < expected:
        raise DataError(f"{url}: cut short, {received} of {expected} bytes came; try again")
