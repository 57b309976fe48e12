"""The scalars of a run as TensorBoard events: a sub-folder per series, a tag per metric."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from noctule.report import files


class Events:
    """Mirrors metrics records under `path`; opens nothing before the first, and does nothing without `tensorboard`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writers: dict[str, Any] = {}
        self._available = True

    def write(self, record: Mapping[str, Any]) -> None:
        """Add every number of `record` at its step (its epoch where it has none) and flush."""
        if not self._available:
            return
        series = str(record.get("series") or "run")
        step = record.get("step", record.get("epoch"))
        step = int(step) if isinstance(step, int | float) else None
        with files.writing(self._path):
            writer = self._writers.get(series) or self._open(series, step)
            if writer is not None:
                for tag, value in scalars(record):
                    writer.add_scalar(tag, value, step)
                writer.flush()

    def close(self) -> None:
        """Close what was opened; a later `write` opens it again."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _open(self, series: str, step: int | None) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._available = False
            warnings.warn("No TensorBoard events are written: `pip install tensorboard` to have them.", stacklevel=4)
            return None
        try:
            str(self._path).encode()
        except UnicodeEncodeError:
            self._available = False
            warnings.warn(
                f"No TensorBoard events are written to {self._path}: this locale has no letters for that name. Set PYTHONUTF8=1.",
                stacklevel=4,
            )
            return None
        # After a resume, TensorBoard hides what the interrupted process had written from this step on.
        writer = SummaryWriter(str(self._path / folder_name(series)), purge_step=step)
        self._writers[series] = writer
        return writer


def folder_name(series: str) -> str:
    """A name for the folder of `series` that stays inside its parent, different for different series.

    >>> folder_name("sparse"), folder_name("a/b"), folder_name("..")
    ('sparse', 'a%2Fb', '%2E.')
    """
    name = quote(series, safe=" ", errors="replace")
    return "%2E" + name[1:] if name.startswith(".") else name


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Each number in `record` under its path, without the three keys that only say where it belongs."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in ("series", "epoch", "step"):
            yield prefix + key, value
