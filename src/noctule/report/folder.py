"""The folder of one run: who ran what where, its metrics as they come, and its summary."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from noctule.errors import NoctuleError, UsageError
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

        UsageError, with nothing touched, where a file, a run or anything else is in the way or nothing can be written.
        """
        path = Path(path)
        _refuse_occupied(path)
        about = {
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
                    folder.mkdir()
                    made.append(folder)
            files.replace(path / "run.json", files.to_json(files.plain(about, other=str), indent=2))
        except (OSError, NoctuleError) as error:
            for folder in reversed(made):
                folder.rmdir()
            raise UsageError(f"No run can be written to {path}: {error}. Choose another folder.") from error
        return cls(path)

    @classmethod
    def of_worker(cls, run: Self, worker: int) -> Self:
        """Where one of several workers keeps its records: worker 0 in the run's own folder, another in one of its own inside."""
        if worker == 0:
            return cls(run.path)
        path = run.path / "workers" / str(worker)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "run.json").is_file():
            files.replace(path / "run.json", files.to_json(run.about() | {"worker": worker}, indent=2))
        return cls(path)

    @property
    def whole(self) -> Path:
        """The folder of the whole run, also where this is that of one of its workers."""
        return self.path.parent.parent if self.path.parent.name == "workers" else self.path

    def workers(self) -> list[Self]:
        """Of a run by several workers the folder of each, in their order; of any other this one alone."""
        others = [p for p in (self.path / "workers").glob("*/run.json") if p.parent.name.isdecimal()]
        return [self, *(type(self)(path.parent) for path in sorted(others, key=lambda path: int(path.parent.name)))]

    def about(self) -> dict[str, Any]:
        """What `run.json` says: recipe, options, seed, versions, threads, instruction set, start, machine, command."""
        return files.read_object(self.path / "run.json")

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one record to the metrics, at once and for good, and to TensorBoard; NaN and infinities become null."""
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


def _refuse_occupied(path: Path) -> None:
    """UsageError unless `path` is missing or an empty folder (what a killed `create` leaves counts as empty)."""
    try:
        if not path.exists():
            return
        if not path.is_dir():
            raise UsageError(f"{path} is a file, and a run needs a folder of that name. Choose another one.")
        if (path / "run.json").exists():
            raise UsageError(f"{path} already holds a run. Go on with it by --resume {path}, or choose another folder.")
        if any(entry.name != ".run.json.partial" for entry in path.iterdir()):
            raise UsageError(f"{path} is not empty and not a run. Choose another folder, or empty it yourself.")
    except OSError as error:
        raise UsageError(f"{path} cannot be used for a run: {error}. Choose another folder.") from error
