"""An epoch uses every sample once, in an order that is a function of seed, epoch and position alone."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from noctule.data import Batches, Dataset

law = settings(deadline=None, derandomize=True, max_examples=50)
sizes = st.integers(1, 70)
seeds = st.integers(-(2**70), 2**70)


def make(rows: int) -> Dataset:
    return Dataset(torch.arange(rows).unsqueeze(1), torch.arange(rows) % 2, name="toy", classes=2)


def rows_of(batches: Batches, epoch: int, start: int = 0) -> list[int]:
    return [int(row) for inputs, _ in batches.epoch(epoch, start) for row in inputs[:, 0]]


@law
@given(sizes, sizes, seeds, st.integers(0, 10**6), st.booleans())
def test_an_epoch_is_a_permutation_and_targets_follow(
    rows: int, size: int, seed: int, epoch: int, shuffle: bool
) -> None:
    batches = Batches(make(rows), size, seed=seed, shuffle=shuffle)
    seen = list(batches.epoch(epoch))
    assert len(seen) == len(batches) == -(-rows // size)
    assert [len(targets) for _, targets in seen[:-1]] == [size] * (len(seen) - 1)
    inputs, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert sorted(inputs[:, 0].tolist()) == list(range(rows))
    assert torch.equal(targets, inputs[:, 0].long() % 2)
    assert shuffle or inputs[:, 0].tolist() == list(range(rows))


@law
@given(sizes, sizes, seeds, st.integers(0, 99), st.data())
def test_starting_later_gives_the_tail(rows: int, size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    batches = Batches(make(rows), size, seed=seed)
    start = data.draw(st.integers(0, len(batches)))
    assert rows_of(batches, epoch, start) == rows_of(batches, epoch)[start * size :]


@law
@given(sizes, sizes, seeds, st.integers(0, 99))
def test_drop_last_leaves_out_only_the_short_batch(rows: int, size: int, seed: int, epoch: int) -> None:
    whole = Batches(make(rows), size, seed=seed)
    if size > rows:
        with pytest.raises(ValueError, match="no batch at all"):
            Batches(make(rows), size, seed=seed, drop_last=True)
        return
    dropped = Batches(make(rows), size, seed=seed, drop_last=True)
    assert len(dropped) == rows // size
    assert rows_of(dropped, epoch) == rows_of(whole, epoch)[: rows // size * size]


@law
@given(seeds, st.integers(0, 10**6), st.integers(1, 5))
def test_the_order_depends_on_seed_and_epoch_alone(seed: int, epoch: int, size: int) -> None:
    one, other = Batches(make(64), size, seed=seed), Batches(make(64), size + 1, seed=seed)
    torch.manual_seed(epoch)
    before = torch.random.get_rng_state()
    assert rows_of(one, epoch) == rows_of(one, epoch) == rows_of(other, epoch)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator is left alone"
    assert rows_of(one, epoch) != rows_of(one, epoch + 1)
    assert rows_of(one, epoch) != rows_of(Batches(make(64), size, seed=seed + 1), epoch)
    assert rows_of(one, epoch) != rows_of(Batches(make(64), size, seed=epoch), seed) or seed == epoch


def test_the_order_is_the_same_today_and_tomorrow() -> None:
    assert rows_of(Batches(make(8), 3, seed=0), 0) == [5, 3, 6, 1, 2, 4, 0, 7]


def test_batches_are_copies() -> None:
    whole = make(4)
    for shuffle in (True, False):
        for inputs, targets in Batches(whole, 2, seed=0, shuffle=shuffle).epoch(0):
            inputs.fill_(9)
            targets.fill_(9)
    assert whole.inputs[:, 0].tolist() == [0, 1, 2, 3]
    assert whole.targets.tolist() == [0, 1, 0, 1]


def test_bad_numbers_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        Batches(make(4), 0, seed=0)
    for start in (-1, 3):
        with pytest.raises(ValueError, match="between 0 and the 2 batches"):
            Batches(make(4), 2, seed=0).epoch(0, start)


class Counted(TorchDispatchMode):
    """How often each operation runs, and how many bytes it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.made_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        self.calls[name] += 1
        self.made_bytes[name] += result.nbytes if isinstance(result, torch.Tensor) else 0
        return result


def test_gathering_an_epoch_copies_each_sample_once_and_draws_one_permutation() -> None:
    pictures = Dataset(torch.zeros(6_000, 784), torch.zeros(6_000).long(), name="toy", classes=1)
    batches = Batches(pictures, 128, seed=0)
    with Counted() as counted:
        assert sum(len(targets) for _, targets in batches.epoch(0)) == 6_000
    copies = {"index", "index_select", "_to_copy", "clone", "copy_"} & counted.calls.keys()
    assert counted.calls["randperm"] == 1
    assert sum(counted.calls[name] for name in copies) <= 2 * len(batches)
    assert sum(counted.made_bytes[name] for name in copies) <= pictures.inputs.nbytes + pictures.targets.nbytes
    assert sum(counted.calls.values()) <= 8 * len(batches)
