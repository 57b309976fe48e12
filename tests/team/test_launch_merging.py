"""The real loop at a real parameter server and then apart: a worker that is lost in the merge costs nothing but time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from noctule import ToSparse, convert_
from noctule.checkpoint import Checkpoints
from noctule.core.errors import LostWorkerError
from noctule.data import Batches, Dataset
from noctule.parallel.server.listen import serve
from noctule.sparse.rewire.set import anywhere
from noctule.team.strategies import made
from noctule.team.wasap import WasapTeam
from noctule.train.fit import fit


class Meeting:
    """A group of one, at times after another worker was lost on its way to it."""

    def __init__(self, lost: int) -> None:
        self.lost, self.met = lost, 0

    def form(self) -> None:
        self.lost -= 1
        if self.lost >= 0:
            raise LostWorkerError("a worker was lost on its way to the merge")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.met += 1

    def leave(self) -> None:
        pass


class Journal:
    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.records: list[dict[str, Any]] = []

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def rewind(self, epoch: int) -> None:
        self.records = [record for record in self.records if record["epoch"] <= epoch]


@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize("rewire", [True, False])
def test_a_merge_in_which_a_worker_was_lost_is_made_up_for(tmp_path, lost, rewire):
    draws = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(40, 6, generator=draws), torch.randint(3, (40,), generator=draws)
    dataset = Dataset(inputs, targets, name="some", classes=3)
    strategy = made({"strategy": "wasap"})
    meeting, journal = Meeting(lost), Journal(Checkpoints(tmp_path))

    def training(team: WasapTeam) -> Callable[[], Any]:
        def once() -> Any:
            torch.manual_seed(0)
            sparse = ToSparse(density=0.5)
            model = convert_(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)), sparse).model
            own = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            moving = team.rewire(every=2, grow=anywhere) if rewire else ()
            return fit(
                model,
                own,
                team.share(Batches(dataset, 4, seed=0)),
                validation=dataset,
                epochs=2,
                methods=[*moving, *team.methods(steps=20)],
                journal=team.journal(journal, steps=20),
            )

        return once

    with serve(strategy.optimizer) as server:
        team = WasapTeam(meeting, ticket=server.ticket(0), world=1, strategy=strategy, timeout_seconds=10)
        fitted = team.train(training(team))
        assert server.versions == [14]
    assert fitted.step == 20
    assert meeting.met == 1
    assert [record["epoch"] for record in journal.records] == [1, 2]
    assert all("staleness" in record["together"] for record in journal.records)
    assert not dist.is_initialized()
