"""The folder of one run: its command and machine, its metrics as they come, and its summary."""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Self

from noctule.core.errors import NoctuleError, UsageError
from noctule.report import files, metrics
from noctule.report.events import Events
from noctule.report.machine import machine, versions


class RunFolder:
    """An existing run at `path`; as a context manager it closes its TensorBoard files. UsageError where no run is.

    >>> import tempfile
    >>> with RunFolder.create(tempfile.mkdtemp(), recipe="sparse_mlp", options={"epochs": 1}, seed=0) as run:
    ...     run.log({"series": "sparse", "epoch": 1, "step": 10, "train_loss": 0.5})
    >>> run.metrics()[0]["train_loss"]
    0.5
    """

    def __init__(self, path: str | Path) -> None:
        """Open the run at `path`, changing nothing."""
        self.path = Path(path).absolute()
        if not (self.path / "run.json").is_file():
            raise UsageError(f"{self.path} is not a run: it has no run.json. Name a folder that `noctule run` wrote.")
        self._metrics = self.path / "metrics.jsonl"
        self._summary = self.path / "summary.json"
        self._events = Events(self.path / "tensorboard")
        self.on_begin: Callable[[], None] | None = None
        """A hook called once, when the first series is about to be trained; a run refused before that has not begun."""

        self.new = False
        """Whether this process created the run."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        recipe: str,
        options: Mapping[str, Any],
        seed: int,
        threads: int | None = None,
        instruction_set: str | None = None,
        command: Sequence[str] | None = None,
        together: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start a run in a new or empty folder; `command` is what was typed, word for word, `together` how several workers train.

        Of several processes that start one in the same folder, one does.

        UsageError, with nothing touched, where a file, a run or anything else is in the way or nothing can be written.
        """
        path = Path(path)
        refuse_occupied(path)
        about = {
            "folder": str(path.absolute()),
            "recipe": recipe,
            "options": dict(options),
            "seed": seed,
            "versions": versions(),
            "threads": threads,
            "instruction_set": instruction_set,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": machine(),
            "command": command,
            "together": None if together is None else dict(together),
        }
        made: list[Path] = []
        try:
            for folder in [path, *path.parents][::-1]:
                if not folder.exists():
                    with suppress(FileExistsError):  # another process was faster
                        folder.mkdir()
                        made.append(folder)
            with _locked(path):
                refuse_occupied(path)
                files.replace(path / "run.json", files.to_json(files.plain(about, other=str), indent=2))
        except (OSError, NoctuleError) as error:
            for folder in reversed(made):
                with suppress(OSError):  # it is another's by now
                    folder.rmdir()
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"No run can be written to {path}: {error}. Choose another folder with --out.") from error
        run = cls(path)
        run.new = True
        return run

    @classmethod
    def create_in(cls, parent: str | Path, name: str, **about: Any) -> Self:
        """Start a run in a new folder inside another one, numbered where the name is taken; `about` are arguments of `create`."""
        for number in count(1):
            path = Path(parent) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise UsageError(f"No run can be written to {path}: {error}. Choose a folder with --out.") from error
            try:
                return cls.create(path, **about)
            except UsageError:
                with suppress(OSError):
                    path.rmdir()
                raise
        raise AssertionError

    @classmethod
    def of_worker(cls, run: Self, worker: int) -> Self:
        """The folder for the records of a worker: the run's own for worker 0, a folder inside it for the others."""
        if worker == 0:
            return cls(run.path)
        path = run.path / "workers" / str(worker)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "run.json").is_file():
            files.replace(path / "run.json", files.to_json(run.about() | {"worker": worker}, indent=2))
        return cls(path)

    @property
    def whole(self) -> Path:
        """The folder of the whole run, also where this is the folder of a worker."""
        return self.path.parent.parent if self.path.parent.name == "workers" else self.path

    def workers(self) -> list[Self]:
        """The folders of all workers in their order; this one alone in a run by a single process."""
        others = [p for p in (self.path / "workers").glob("*/run.json") if p.parent.name.isdecimal()]
        return [self, *(type(self)(path.parent) for path in sorted(others, key=lambda path: int(path.parent.name)))]

    def about(self) -> dict[str, Any]:
        """What `run.json` says: recipe, options, seed, versions, threads, instruction set, start, machine, command."""
        return files.read_object(self.path / "run.json")

    def settle(self) -> dict[str, Any]:
        """What `about` says, for a run that is to go on here: paths that were moved along with its folder are found again.

        UsageError where the folder cannot be written.
        """
        about = self.about()
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UsageError(f"{self.path} cannot be written by this user: go on with a copy of it, or as its owner.")
        before = about.get("folder")
        if before is not None and before != str(self.path):
            about |= {"folder": str(self.path), "recipe": _moved(about["recipe"], before, self.path)}
            about["options"] = {name: _moved(value, before, self.path) for name, value in about["options"].items()}
            files.replace(self.path / "run.json", files.to_json(about, indent=2))
        return about

    def begin(self) -> None:
        """Say that training begins, the first time."""
        begin, self.on_begin = self.on_begin, None
        if begin is not None:
            begin()

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one record to the metrics, at once and for good, and to TensorBoard; NaN and infinities become null."""
        self.begin()
        self._events.write(metrics.append(self._metrics, record))

    def metrics(self) -> list[dict[str, Any]]:
        """Every record logged so far, oldest first, without a last line that a killed process left torn."""
        return metrics.read(self._metrics)

    def truncate_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the records that `keep` refuses (those past the checkpoint when a run resumes), all or none."""
        self._events.close()
        metrics.rewrite(self._metrics, keep)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Store the outcome, replacing an earlier one in one step; NaN and infinities become null."""
        files.replace(self._summary, files.to_json(files.plain(summary), indent=2))

    def summary(self) -> dict[str, Any]:
        """The outcome; empty while the run has none."""
        return files.read_object(self._summary) if self._summary.exists() else {}

    def close(self) -> None:
        """Close the TensorBoard files; logging opens them again."""
        self._events.close()

    def __enter__(self) -> Self:
        """The run itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the TensorBoard files."""
        self.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _moved(value: Any, before: str, now: Path) -> Any:
    """A path that is there no longer, but in the same place as seen from a run's folder, which was moved; all else as it is."""
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    file, suffix, function = value.partition(".py:")
    path = Path(file + suffix[:3])
    if path.exists():
        return value
    found = Path(os.path.normpath(now / os.path.relpath(path, before)))
    return f"{found}{suffix[3:]}{function}" if found.exists() else value


def refuse_occupied(path: Path) -> None:
    """UsageError unless a run can be made at `path`, a missing or empty folder (what a killed `create` leaves is empty)."""
    try:
        if not path.exists():
            parent = next(folder for folder in path.absolute().parents if folder.exists())
            if parent.is_dir() and not os.access(parent, os.W_OK | os.X_OK):
                raise UsageError(
                    f"No run can be written to {path}: this user may not write into {parent}. Choose another folder with --out."
                )
            return
        if not path.is_dir():
            raise UsageError(f"{path} is a file, and a run needs a folder of that name. Choose another one.")
        if (path / "run.json").exists():
            raise UsageError(f"{path} already holds a run. Go on with it by --resume {path}, or choose another folder.")
        if any(not entry.name.startswith(".run.json.") for entry in path.iterdir()):
            raise UsageError(f"{path} is not empty and not a run. Choose another folder, or empty it yourself.")
    except OSError as error:
        raise UsageError(f"{path} cannot be used for a run: {error}. Choose another folder.") from error
