"""FSDP2, distributed checkpoints and DistributedDataParallel between real processes."""

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from noctule.testing.processes import Workers


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as group:
        yield group


def test_fixed_connections_train_in_shards_as_on_one_and_come_back_on_one(workers, tmp_path):
    plain = ranks.build()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    ranks.steps(plain, optimizer, 6)
    for never_stopped, resumed in workers.call(ranks.fixed_connections, str(tmp_path)):
        torch.testing.assert_close(never_stopped, plain(ranks.X).detach())
        assert torch.equal(resumed, never_stopped)
    other = ranks.build(seed=1)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    state, optimizer_state = get_state_dict(other, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    set_state_dict(other, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    ranks.steps(other, optimizer, 3)
    torch.testing.assert_close(other(ranks.X), plain(ranks.X))
    halfway = ranks.build()
    ranks.steps(halfway, torch.optim.Adam(halfway.parameters(), lr=0.01), 3)
    for found in workers.call(ranks.other_places, str(tmp_path)):
        torch.testing.assert_close(found, halfway(ranks.X).detach())


def test_moving_connections_of_sharded_values_are_refused(workers):
    for said in workers.call(ranks.moving_connections):
        assert "train with EverySync or DistributedDataParallel" in said


@pytest.mark.parametrize("methods", [False, True])
def test_ranks_whose_places_differ_are_told_at_attach(workers, methods):
    for said in workers.call(ranks.places_of_their_own, methods):
        assert "differ" in said
