"""A folder that keeps the newest checkpoints of a training."""

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from noctule.checkpoint.atomic import remove_abandoned
from noctule.checkpoint.state import load, save
from noctule.core.errors import CheckpointError


class Checkpoints:
    """A folder of checkpoints, one a step, of which the newest `keep` stay; the first `save` makes it.

    >>> import tempfile
    >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep=2)
    >>> checkpoints.save(100, {"epoch": 1}).name
    'step-000000000100.safetensors'
    >>> checkpoints.latest()
    (100, {'epoch': 1})
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay")
        self.folder = Path(folder)
        self.keep = keep
        self._bad: set[int] = set()

    def path(self, step: int) -> Path:
        """Path of the checkpoint of a step, whether it exists or not."""
        return self.folder / f"step-{step:012d}.safetensors"

    def steps(self) -> list[int]:
        """The steps that have a file, readable or not, oldest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{12})\.safetensors", name)))

    def save(self, step: int, state: Any) -> Path:
        """Write the state of a step, then remove older checkpoints beyond `keep`; later steps are left alone."""
        if not 0 <= step < 10**12:
            raise ValueError(f"step={step}: a step is a number from 0 to 999,999,999,999")
        for leftover in self.folder.glob(".step-*.tmp"):
            remove_abandoned(leftover)
        save(self.path(step), state)
        self._bad.discard(step)
        older = [s for s in self.steps() if s < step]
        readable = [s for s in older if s not in self._bad]
        for old in {*older}.difference(readable[::-1][: self.keep - 1]):
            with suppress(OSError):
                self.path(old).unlink()
        return self.path(step)

    def latest(self) -> tuple[int, Any] | None:
        """The newest readable checkpoint as (step, state), or None where there is no file.

        An unreadable one is named in a warning and passed over. Raises CheckpointError where all are unreadable.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                state = load(self.path(step))
            except CheckpointError as error:
                self._bad.add(step)
                reasons.append(str(error))
                continue
            for reason in reasons:
                warnings.warn(f"passed over a checkpoint for that of step {step}: {reason}", stacklevel=2)
            return step, state
        if reasons:
            raise CheckpointError("no checkpoint is readable:\n  " + "\n  ".join(reasons))
        return None
