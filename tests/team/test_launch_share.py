"""All parts together are the batch, in its order, however many workers there are."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noctule.core.errors import LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import attach
from noctule.data import Batches, Dataset
from noctule.exchange import Local, Weigh
from noctule.parallel.server.listen import serve
from noctule.team.elastic import Elastic
from noctule.team.group import GroupTeam
from noctule.team.member import Team, as_member_of, team
from noctule.team.served import ServedTeam
from noctule.team.share import Share
from noctule.team.strategies import made


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
    members = [Share(batches, Member(rank, world), weigh) for rank, weigh in enumerate(weighs)]
    shares = [member.epoch(epoch) for member in members]
    for inputs, targets in batches.epoch(epoch):
        parts = [next(share) for share in shares]
        counts = [int(weigh.n) for weigh in weighs]
        assert [share.counts for share in members] == pytest.approx([n * world / len(targets) for n in counts])
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


def test_a_team_hears_before_each_batch_but_the_one_that_it_resumes_at():
    heard = []

    class Hearing(Member):
        def before_batch(self, step, *, first):
            heard.append((step, first))

    share = Share(Batches(numbered(32), 8, seed=0), Hearing(0, 1))
    for epoch, start in ((0, 0), (1, 2), (1, 4)):
        for _ in share.epoch(epoch, start):
            heard.append(None)
    assert heard == [(0, True), None, (1, False), None, (2, False), None, (3, False), None, None, (7, False), None]


@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_only_workers_that_go_apart_vote_and_only_right_after_a_meeting(strategy):
    class Called:
        called, lost, stopped = True, False, False

    options = {} if strategy == "sync" else {"meet": 4}
    together = GroupTeam(Called(), member=0, strategy=made({"strategy": strategy, **options}))
    together._means = Elastic(together, lambda: Channel(path=Local.together(1)[0]), leave_for_new_group=False)
    voted = []
    for step in range(12):
        try:
            together.before_batch(step, first=step % 6 == 0)
        except LostWorkerError:
            voted.append(step)
            assert together.broken
    assert voted == ([] if strategy == "sync" else [0, 4, 6, 8])


@pytest.mark.parametrize(("world", "samples"), [(2, 11), (3, 10), (4, 10), (4, 9)])
def test_at_a_synchronous_server_all_parts_are_one_worker_on_the_batch(world, samples):
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    data = Dataset(
        torch.randn(samples, 6, generator=torch.Generator().manual_seed(1)),
        torch.arange(samples) % 3,
        name="n",
        classes=3,
    )
    batches = Batches(data, 8, seed=0)  # whose last ones are of 3, 2 or 1

    def train(model, optimizer, source):
        for epoch in range(3):
            for x, y in source.epoch(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    models = [copy.deepcopy(plain) for _ in range(world)]
    expected = train(plain, momentum(plain.parameters()), batches)
    with serve(momentum, workers=world) as server, ThreadPoolExecutor(world) as threads:

        def job(rank):
            here = ServedTeam(server.ticket(rank), world=world, strategy=made({"strategy": "bsp"}), timeout_seconds=30)
            model = models[rank]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with attach(model, optimizer, *here.methods(steps=6)):
                return train(model, optimizer, here.share(batches))

        found = list(threads.map(job, range(world)))
    for ours in found:
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


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
