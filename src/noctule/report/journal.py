"""One series of a run: its records among the metrics, its checkpoints beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from noctule.checkpoint import Checkpoints
from noctule.report.folder import RunFolder


@dataclass(frozen=True)
class Journal:
    """What `fit` writes to and resumes from; `series` is the name of its lines in the report."""

    run: RunFolder
    series: str

    def __post_init__(self) -> None:
        self.run.begin()

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this series."""
        return Checkpoints(self.run.path / "checkpoints" / self.series)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a record to the run's metrics."""
        self.run.log({"series": self.series, **record})

    def rewind(self, epoch: int) -> None:
        """Remove this series' records past an epoch, before they are made again."""
        if any(self._past(record, epoch) for record in self.run.metrics()):
            self.run.truncate_metrics(lambda record: not self._past(record, epoch))

    def _past(self, record: Mapping[str, Any], epoch: int) -> bool:
        return record.get("series") == self.series and record.get("epoch", 0) > epoch
