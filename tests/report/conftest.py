"""Made-up runs, written to real folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up import DATA, DENSE, SPARSE, epochs

from noctule.report import RunFolder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """Writes a run of given records and summary; by default a finished sparse one beside its dense twin."""

    def make(
        name: str = "run",
        *,
        records: list[dict[str, Any]] | None = None,
        series: dict[str, Any] | None = None,
        **about: Any,
    ) -> RunFolder:
        if records is None:
            records = epochs("sparse", layers=True) + epochs("dense", pace=8.5)
        if series is None:
            series = {"sparse": SPARSE, "dense": DENSE}
        given = {"recipe": "sparse_mlp", "options": {"epochs": 10, "hidden": [300, 100], "rewire": True}, "seed": 1}
        run = RunFolder.create(tmp_path / name, **(given | about))
        for record in records:
            run.log(record)
        if series:
            run.write_summary({"data": DATA, "series": series})
        run.close()
        return run

    return make
