"""Workers begin with one model and then draw each for itself."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from noctule.team.group import GroupTeam


class Meeting:
    """A group of one."""

    called = lost = stopped = False

    def form(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def again(self) -> bool:
        return False


@pytest.fixture
def left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def masks(member: int, seed: int) -> list[torch.Tensor]:
    """The dropout of two trainings of one worker, whose script seeded torch and made a model."""
    torch.manual_seed(seed)
    team = GroupTeam(Meeting(), member=member, strategy=SimpleNamespace(equal_weights=True))
    drawn = [team.train(lambda: torch.dropout(torch.ones(64), 0.5, True)) for _ in range(2)]
    dist.destroy_process_group()
    return drawn


def test_each_worker_draws_another_dropout_and_the_same_again_with_the_same_seed(left):
    found = [masks(member, seed) for seed in (0, 1) for member in (0, 1, 2)]
    every = [mask for pair in found for mask in pair]
    assert not any(torch.equal(a, b) for n, a in enumerate(every) for b in every[:n])
    for a, b in zip(masks(2, 1), found[-1], strict=True):
        assert torch.equal(a, b)
