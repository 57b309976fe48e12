"""A line that says how far a long piece of work is, how fast it goes and how long it will take."""

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """A progress line on stderr: redrawn in place on a terminal, else a new line every so many seconds.

    Without a terminal, work that ends before the first such line prints nothing.

    >>> with Progress(1000, label="training", unit="steps") as progress:
    ...     for step in range(1000):
    ...         progress.advance(note="loss 0.25")
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        label: str = "",
        unit: str = "",
        start: int = 0,
        every_seconds: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        """Begin at `start` of `total` units (None: not known); `every_seconds` is for where there is no terminal."""
        self.total = total
        self.done = start
        self._label = label
        self._unit = unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every_seconds = 0.1 if self._terminal else every_seconds
        self._start, self._began = start, time.monotonic()
        self._shown = self._began
        self._note = ""
        self._width = 0
        self._closed = False

    def advance(self, n: int = 1, *, note: str | None = None) -> None:
        """Count `n` more units; `note` (a loss, say) is shown at the end of the line from now on."""
        self.done += n
        if note is not None:
            self._note = note
        if time.monotonic() - self._shown >= self._every_seconds:
            self._show()

    def close(self) -> None:
        """Show the last state of the line and leave it; nothing happens the second time."""
        if not self._closed and (self._shown > self._began or self._terminal):
            self._show(last=True)
        self._closed = True

    def line(self) -> str:
        """The line as it is now."""
        seconds = time.monotonic() - self._began
        rate = (self.done - self._start) / seconds if seconds > 0 else 0.0
        of = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self._label} {self.done:,}{of} {self._unit}".strip()]
        if self.total:
            parts.append(f"{self.done / self.total:.0%}")
        parts.append(f"{_short(rate)} {self._unit}/s".replace(" /s", "/s"))
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        else:
            parts.append(_clock(seconds))
        return "  ".join([*parts, self._note]).rstrip()

    def __enter__(self) -> "Progress":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the line as it is."""
        self.close()

    def _show(self, *, last: bool = False) -> None:
        self._shown = time.monotonic()
        text = self.line()
        if self._terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            padding = " " * (self._width - len(text))
            self._width = len(text)
            text = f"\r{text}{padding}"
        try:
            self._stream.write(text + ("\n" if last or not self._terminal else ""))
            self._stream.flush()
        except (OSError, ValueError):  # the reader has gone, which must not end the work
            self._every_seconds = float("inf")


def _short(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
