"""Standard output that never ends the work: not with a terminal of ASCII, a reader that has gone or a full disk."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO

_PLAIN = str.maketrans(
    {"\u00a0": " ", "\u202f": " ", "\u2026": "...", "\u00d7": "x", "\u00b1": "+-", "\u00b7": "-", "\u2212": "-"}
)
"""Signs that have a form in ASCII."""


class Output(io.TextIOBase):
    """Passes text on to a stream until that fails, and drops it from then on.

    Args:
        stream: what it cannot encode is printed escaped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        """The error after which nothing is printed any longer."""

    def write(self, text: str) -> int:
        """Print a text, or nothing once that has failed."""
        if self.failure is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                plain = _known(text).translate(_PLAIN)
                self._stream.write(plain.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = error
        with suppress(
            OSError, ValueError
        ):  # what is in the stream's own buffer goes nowhere, and Python does not try again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the stream."""
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's file number."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """True: text can be written."""
        return True


def _known(text: str) -> str:
    """A text with letters for the bytes of file names that Python's own locale has none for."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeError:
        return text


@contextmanager
def tolerant() -> Iterator[None]:
    """Within the block printing raises nothing; OSError at its end where the disk behind standard output is full."""
    with ExitStack() as stack:
        out, err = sys.stdout, sys.stderr
        ours = [None if stream is None else Output(stream) for stream in (out, err)]

        def put_back() -> None:
            sys.stdout, sys.stderr = out, err

        stack.callback(put_back)
        sys.stdout, sys.stderr = ours
        yield
        for stream in filter(None, ours):
            stream.flush()
    if ours[0] is not None and (failure := ours[0].failure) is not None and failure.errno != errno.EPIPE:
        raise OSError(failure.errno, f"standard output could not be written: {failure.strerror}")
