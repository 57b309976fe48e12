"""Networks of several workers made one: laws of the merge, and what must not be merged."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moving_jobs import alike, sparse, state_of
from push_pull_jobs import ADAGRAD, ADAM, MOMENTUM, batch, train
from torch import nn

from exchange_cases import together
from noctule import SparseLinear, ToSparse, convert_, set_
from noctule.core.errors import ExchangeError, LostWorkerError
from noctule.core.exchange import Channel
from noctule.core.method import attach
from noctule.core.topology import Topology
from noctule.parallel.merging import Merge, largest, merge_workers


def apart(rank, optimizer=MOMENTUM, steps=5, build=sparse):
    model = build()
    own = optimizer(model.parameters())
    with attach(model, own, set_(every=2, seed=rank)):
        train(model, own, [batch(rank, n) for n in range(steps)])
    return model, own


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAGRAD, ADAM], ids=["momentum", "adagrad", "adam"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_afterwards_all_workers_are_alike_and_as_large_as_before(world, optimizer):
    def job(path):
        model, own = apart(path.rank, optimizer, steps=4 + path.rank)
        before = state_of(model, own)
        merge_workers(model, own, Channel(path=path))
        own.step()  # it goes on, from whatever gradient there is
        merge_workers(model, own, Channel(path=path))
        return before, state_of(model, own), model

    found = together(world, job)
    assert alike([after for _, after, _ in found])
    assert all(m[0].weights == 24 and m[2].weights == 12 for *_, m in found)
    if world > 1:
        assert not alike([before for before, *_ in found])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(0, 1000))
def test_each_connection_is_the_mean_of_those_who_hold_it_and_the_largest_stay(world, seed):
    def job(path):
        generator = torch.Generator().manual_seed(seed + path.rank)
        layer = SparseLinear(5, 4, weights=7, generator=generator)
        optimizer = MOMENTUM(layer.parameters())
        (layer(torch.randn(3, 5, generator=generator)) ** 2).sum().backward()
        optimizer.step()
        mine = dict(zip(layer.topology.keys().tolist(), layer.values.tolist(), strict=True))
        momenta = dict(
            zip(layer.topology.keys().tolist(), optimizer.state[layer.values]["momentum_buffer"].tolist(), strict=True)
        )
        bias = layer.bias.detach().clone()
        merge_workers(layer, optimizer, Channel(path=path))
        return mine, momenta, bias, layer, optimizer.state[layer.values]["momentum_buffer"]

    found = together(world, job)
    means, momenta = {}, {}
    for key in {key for mine, *_ in found for key in mine}:
        holders = [worker for worker in found if key in worker[0]]
        means[key] = sum(worker[0][key] for worker in holders) / len(holders)
        momenta[key] = sum(worker[1][key] for worker in holders) / len(holders)
    kept = sorted(sorted(means, key=lambda key: -abs(means[key]))[:7])
    for *_, bias, layer, momentum in found:
        assert layer.topology.keys().tolist() == kept
        torch.testing.assert_close(layer.values.detach(), torch.tensor([means[key] for key in kept]))
        torch.testing.assert_close(momentum, torch.tensor([momenta[key] for key in kept]))
        torch.testing.assert_close(layer.bias.detach(), torch.stack([each[2] for each in found]).mean(0))
        assert bias.shape == (4,)


def test_what_one_worker_of_several_found_keeps_its_full_weight():
    def job(path):
        layer = SparseLinear(4, 1, topology=Topology.from_keys((1, 4), torch.tensor([0, 1 + path.rank])), bias=False)
        with torch.no_grad():
            layer.values.copy_(torch.tensor([1.0, 5.0 * (path.rank == 1) + 0.1]))
        merge_workers(layer, torch.optim.SGD(layer.parameters(), lr=0.1), Channel(path=path))
        return layer

    for layer in together(3, job):
        assert layer.topology.columns.tolist() == [0, 2]
        assert torch.equal(layer.values.detach(), torch.tensor([1.0, 5.1]))


def test_networks_that_are_alike_stay_as_they_are():
    def job(path):
        model, own = apart(0)
        before = state_of(model, own)
        merge_workers(model, own, Channel(path=path))
        return [before, state_of(model, own)]

    for states in together(3, job):
        assert alike(states)


def test_buffers_and_counters_and_what_is_frozen():
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        model[0].requires_grad_(False)
        return convert_(model, ToSparse(density=0.5)).model

    built = build()  # here: threads share one generator

    def job(path):
        model = copy.deepcopy(built)
        own = ADAM([p for p in model.parameters() if p.requires_grad])
        frozen = model[0].values.detach().clone()
        train(model, own, [batch(path.rank, n) for n in range(3 + path.rank)])
        mean = model[1].running_mean.clone()
        merge_workers(model, own, Channel(path=path))
        assert torch.equal(model[0].values, frozen)
        assert float(own.state[model[3].values]["step"]) == 4
        assert int(model[1].num_batches_tracked) == 4
        return mean, model[1].running_mean, state_of(model, own)

    (a, merged, first), (b, _, second) = together(2, job)
    torch.testing.assert_close(merged, (a + b) / 2)
    assert alike([first, second])


def test_a_merge_at_the_last_step_comes_after_connections_that_move_then():
    def job(path):
        model = sparse()
        own = MOMENTUM(model.parameters())
        with attach(model, own, Merge(Channel(path=path), every=6), set_(every=3, seed=path.rank)):
            train(model, own, [batch(path.rank, n) for n in range(5)])
            before = state_of(model, own)
            train(model, own, [batch(path.rank, 5)])
            return before, state_of(model, own)

    found = together(2, job)
    assert not alike([before for before, _ in found])
    assert alike([after for _, after in found])


@pytest.mark.parametrize("every", [None, 100])
def test_a_session_that_settles_merges_only_where_no_step_is_named(every):
    def job(path):
        model = sparse()
        own = MOMENTUM(model.parameters())
        method = Merge(Channel(path=path), every=every)
        with attach(model, own, method, set_(every=3, seed=path.rank)) as session:
            train(model, own, [batch(path.rank, n) for n in range(4)])
            session.settle()
            settled = state_of(model, own)
            method.now()
            assert method.steps == 0
            return settled, state_of(model, own)

    found = together(2, job)
    assert alike([settled for settled, _ in found]) == (every is None)
    assert alike([after for _, after in found])


def test_resuming_is_never_having_stopped():
    def job(path, stop):
        model = sparse()
        own = MOMENTUM(model.parameters())
        methods = [Merge(Channel(path=path), every=4), set_(every=3, seed=path.rank)]
        with attach(model, own, *methods) as session:
            train(model, own, [batch(path.rank, n) for n in range(stop)])
            saved = copy.deepcopy([model.state_dict(), own.state_dict(), session.state_dict()])
        model = sparse()
        own = MOMENTUM(model.parameters())
        methods = [Merge(Channel(path=path), every=4), set_(every=3, seed=path.rank)]
        with attach(model, own, *methods) as session:
            model.load_state_dict(saved[0])
            own.load_state_dict(saved[1])
            session.load_state_dict(saved[2])
            train(model, own, [batch(path.rank, n) for n in range(stop, 9)])
        return state_of(model, own)

    whole = together(2, partial(job, stop=9))
    for stop in (3, 4, 6):
        for ours, theirs in zip(together(2, partial(job, stop=stop)), whole, strict=True):
            assert alike([ours, theirs])


class Lost(Channel):
    """A worker is lost before the word of this number."""

    def __init__(self, path, before):
        super().__init__(path=path)
        self.before = before

    def share(self, message):
        self.before -= 1
        if not self.before:
            raise LostWorkerError("a worker was lost")
        return super().share(message)


def normed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    return convert_(model, ToSparse(density=0.5)).model


def test_a_merge_that_breaks_off_at_any_word_has_changed_nothing_and_can_be_repeated():
    built = normed()  # here: threads share one generator

    def job(path, words):
        model, own = apart(path.rank, ADAM, steps=3 + path.rank, build=lambda: copy.deepcopy(built))
        before = state_of(model, own)
        for number in words:
            with pytest.raises(LostWorkerError):
                merge_workers(model, own, Lost(path, number))
            assert alike([before, state_of(model, own)])
        whole = Lost(path, 0)
        merge_workers(model, own, whole)
        assert not alike([before, state_of(model, own)])
        return state_of(model, own), -whole.before

    ((expected, words), _) = together(2, partial(job, words=()))
    assert words >= 6  # what they are, three layers, what is dense, counters
    found = together(2, partial(job, words=range(1, words + 1)))
    assert alike([expected, *(state for state, _ in found)])


@pytest.mark.parametrize("word", [2, 5])
def test_a_worker_whom_an_answer_did_not_reach_keeps_the_others_from_merging(word):
    """The words are the handshake, two layers, what is dense, counters, and that all have all of it."""

    class Deaf(Channel):
        left = word

        def share(self, message):
            found = super().share(message)
            self.left -= 1
            if not self.left:
                raise LostWorkerError("the link is down")
            return found

    def job(path):
        model, own = apart(path.rank)
        before = state_of(model, own)
        with pytest.raises(ExchangeError, match="link is down" if path.rank else "did not come"):
            merge_workers(model, own, Deaf(path=path) if path.rank else Channel(path=path))
        assert alike([before, state_of(model, own)])

    together(2, job, timeout_seconds=0.5)


def test_a_merge_that_somebody_here_cannot_follow_has_changed_nothing():
    def refuse(layer, remap):
        raise ValueError("cannot follow")

    def job(path):
        model, own = apart(path.rank)
        before = state_of(model, own)
        model[2].register_remap_check(refuse)
        with pytest.raises(ValueError, match="cannot follow"):
            merge_workers(model, own, Channel(path=path))
        assert alike([before, state_of(model, own)])

    together(2, job)


def broken(rank, what):
    if what == "weights":
        return nn.Sequential(SparseLinear(6, 3, weights=5 + rank)), MOMENTUM
    if what == "shape":
        return nn.Sequential(SparseLinear(6, 3 + rank, weights=5, bias=False)), MOMENTUM
    if what == "optimizer":
        return nn.Sequential(SparseLinear(6, 3, weights=5)), MOMENTUM if rank else ADAM
    return nn.Sequential(nn.Linear(6, 3), *[nn.Linear(3, 3)] * rank), MOMENTUM


@pytest.mark.parametrize(
    ("what", "match"),
    [("weights", "'0.values'"), ("shape", "'0.values'"), ("optimizer", "'0.values'"), ("depth", "'1.weight'")],
)
def test_networks_that_do_not_fit_are_refused_and_left_as_they_are(what, match):
    def job(path):
        model, optimizer = broken(path.rank, what)
        own = optimizer(model.parameters())
        model(torch.ones(2, 6)).sum().backward()
        own.step()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ExchangeError, match=f"worker . differs in {match}"):
            merge_workers(model, own, Channel(path=path))
        assert str(before) == str(model.state_dict())

    together(2, job)


def test_a_message_that_is_something_else_is_refused():
    class Torn(Channel):
        def share(self, message):
            found = super().share(message)
            return found if message.startswith(b"{") else [found[0], found[1][:-1]]

    class Unsorted(Channel):
        def share(self, message):
            found = super().share(message)
            return found if message.startswith(b"{") else [found[0], found[1][:8] + found[1][:8] + found[1][16:]]

    def job(path, kind):
        model, own = apart(path.rank)
        with pytest.raises(ExchangeError, match=r"sent .* bytes for '0.values'|not sorted places"):
            merge_workers(model, own, kind(path=path))

    for kind in (Torn, Unsorted):
        together(2, partial(job, kind=kind))


def test_of_equal_values_the_first_stay():
    topology, kept = largest(Topology.from_keys((2, 3), torch.arange(6)), torch.tensor([1.0, -1, 1, 1, -2, 0]), 3)
    assert kept.tolist() == [0, 1, 4]
    assert topology.keys().tolist() == [0, 1, 4]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="every=0"):
        Merge(Channel(path=None), every=0)  # pyright: ignore[reportArgumentType]
