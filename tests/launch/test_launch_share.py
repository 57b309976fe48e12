"""All parts together are the batch, in its order, however many workers there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.data import Batches, Dataset
from noctule.exchange import Weigh
from noctule.launch.share import Share
from noctule.launch.team import Team, as_member_of, team


class Member(Team):
    def __init__(self, rank, world):
        self.rank, self.world = rank, world


def numbered(samples):
    return Dataset(torch.arange(samples, dtype=torch.float32)[:, None], torch.arange(samples) % 2, name="n", classes=2)


def noisy(x, generator):
    return x + torch.rand(x.shape, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6), st.booleans(), st.integers(0, 3))
def test_the_parts_are_the_batch(samples, size, world, augmented, epoch):
    batches = Batches(numbered(samples), size, seed=3, augment=noisy if augmented else None)
    weighs = [Weigh(-1.0) for _ in range(world)]
    shares = [Share(batches, Member(rank, world), weigh).epoch(epoch) for rank, weigh in enumerate(weighs)]
    for inputs, targets in batches.epoch(epoch):
        parts = [next(share) for share in shares]
        counts = [int(weigh.n) for weigh in weighs]
        assert sum(counts) == len(targets)
        assert max(counts) - min(counts) <= 1
        assert all(len(x) == len(y) >= 1 for x, y in parts)
        for whole, found in ((inputs, [x for x, _ in parts]), (targets, [y for _, y in parts])):
            torch.testing.assert_close(torch.cat([x[:n] for x, n in zip(found, counts)]), whole, rtol=0, atol=0)
    assert not any(list(share) for share in shares)


def test_a_share_goes_on_from_any_batch_and_follows_its_team():
    batches, member = Batches(numbered(32), 8, seed=0), Member(1, 2)
    share = Share(batches, member, Weigh(0.0))
    assert len(share) == 4
    (first, _), *_ = share.epoch(0, start=3)
    member.rank, member.world = 0, 1
    (whole, _), *_ = share.epoch(0, start=3)
    assert torch.equal(first, whole[4:])


def test_a_part_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="part must be"):
        Batches(numbered(4), 2, seed=0).epoch(0, part=(2, 2))


def test_a_process_is_alone_but_within_its_team():
    alone, member = team(), Member(1, 2)
    assert (alone.rank, alone.world, list(alone.methods(steps=1))) == (0, 1, [])
    with as_member_of(member):
        assert team() is member
    assert team() is alone
    batches = Batches(numbered(4), 2, seed=0)
    assert alone.share(batches) is batches
    assert alone.train(lambda: 3) == 3
