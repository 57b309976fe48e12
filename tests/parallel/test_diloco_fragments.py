"""Fragments of a model meet in turn: each is what the whole model is without them, at steps of its own."""

import copy

import diloco_cases as cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from exchange_cases import Half, together
from noctule.codecs import NaturalCompression
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Channel
from noctule.core.method import attach
from noctule.exchange import Compress
from noctule.parallel import AVERAGE, NESTEROV, DiLoCo
from noctule.parallel.fragments import cut, last_due


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=12), st.data())
def test_a_cut_is_even_and_leaves_layers_whole(layers, data):
    parameters = {}
    for at, (size, bias) in enumerate(layers):
        parameters |= {f"{at}.weight": torch.empty(size), f"{at}.bias": torch.empty(bias)}
    fragments = data.draw(st.integers(1, len(layers)))
    found = cut(parameters, fragments)
    sizes = [sum(x.nbytes for name, x in parameters.items() if found[name] == at) for at in range(fragments)]
    largest = max(4 * (size + bias) for size, bias in layers)
    assert list(found) == list(parameters)
    assert set(found.values()) == set(range(fragments))
    assert all(found[f"{at}.weight"] == found[f"{at}.bias"] for at in range(len(layers)))
    assert max(sizes) <= sum(sizes) / fragments + largest
    assert cut(parameters, fragments) == found


@given(st.integers(1, 5), st.integers(1, 5))
def test_equal_layers_go_round_in_their_order(fragments, rounds):
    parameters = {f"blocks.{at}.weight": torch.empty(7) for at in range(fragments * rounds)}
    assert list(cut(parameters, fragments).values()) == list(range(fragments)) * rounds


@given(st.data(), st.integers(1, 30))
def test_turns_are_spread_evenly_and_each_fragment_has_one_in_every_round(data, every):
    fragments = data.draw(st.integers(1, every))
    turns = [
        [at for at in range(fragments) if last_due(at, fragments, every=every, steps=step) == step]
        for step in range(1, 3 * every + 1)
    ]
    assert all(len(each) <= 1 for each in turns)
    steps = [step for step, each in enumerate(turns, start=1) if each]
    assert [at for each in turns for at in each] == list(range(fragments)) * 3
    assert steps[-1] == 3 * every
    assert {b - a for a, b in zip([0, *steps], steps, strict=False)} <= {every // fragments, -(-every // fragments)}
    assert [last_due(0, 1, every=every, steps=step) for step in range(99)] == [s // every * every for s in range(99)]


@pytest.mark.parametrize("outer", [AVERAGE, NESTEROV])
def test_without_options_it_is_the_outer_step_on_the_mean_bit_for_bit(outer):
    models = [cases.network() for _ in range(3)]
    twins = copy.deepcopy(models)

    def work(path):
        model = models[path.rank]
        optimizer = cases.sgd(model)
        with attach(model, optimizer, DiLoCo(Channel(path=path), every=3, outer=outer)):
            cases.train(model, optimizer, path.rank, 0, 8)
        return cases.weights(model)

    points = [nn.Parameter(p.detach().clone()) for p in twins[0].parameters()]
    inner, optimizer = [cases.sgd(twin) for twin in twins], outer(points)
    for step in range(8):
        for rank, twin in enumerate(twins):
            cases.train(twin, inner[rank], rank, step, step + 1)
        if step % 3 == 2:
            with torch.no_grad():
                for point, *several in zip(points, *(twin.parameters() for twin in twins), strict=True):
                    point.grad = torch.stack([point - p for p in several]).mean(0)
                optimizer.step()
                for twin in twins:
                    for p, point in zip(twin.parameters(), points, strict=True):
                        p.copy_(point)
    for found, twin in zip(together(3, work), twins, strict=True):
        assert cases.same(found, cases.weights(twin))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("every", "fragments"), [(4, 2), (5, 3), (4, 4)])
def test_each_fragment_is_the_plain_mean_at_its_own_step(every, fragments, sparse):
    models = [cases.network(sparse=sparse) for _ in range(3)]
    twins = copy.deepcopy(models)

    def work(path):
        model = models[path.rank]
        optimizer = cases.sgd(model)
        method = DiLoCo(Channel(path=path), every=every, fragments=fragments, outer=AVERAGE)
        with attach(model, optimizer, method):
            cases.train(model, optimizer, path.rank, 0, 2 * every + 1)
        return cases.weights(model)

    where = cut(dict(twins[0].named_parameters()), fragments)
    optimizers = [cases.sgd(twin) for twin in twins]
    for step in range(2 * every + 1):
        for rank, twin in enumerate(twins):
            cases.train(twin, optimizers[rank], rank, step, step + 1)
        for name, fragment in where.items():
            if (step + 1 - (fragment + 1) * every // fragments) % every == 0:
                with torch.no_grad():
                    several = [twin.get_parameter(name) for twin in twins]
                    mean = torch.stack(several).mean(0)
                    for p in several:
                        p.copy_(mean)
    for found, twin in zip(together(3, work), twins, strict=True):
        for a, b in zip(found, twin.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-6)


def test_what_is_sent_at_once_is_a_fragment_and_in_the_long_run_as_much():
    def sent(fragments):
        def work(path):
            model = cases.network()
            optimizer, exchange = cases.sgd(model), cases.Told(Channel(path=path))
            with attach(model, optimizer, DiLoCo(exchange, every=6, fragments=fragments)):
                cases.train(model, optimizer, path.rank, 0, 12)
            return [sum(x.nbytes for x in call.values()) for call in exchange.calls]

        (sizes,) = together(1, work)
        return sizes

    parameters = dict(cases.network().named_parameters())
    whole = sum(p.nbytes for p in parameters.values())
    assert sent(1) == [whole, whole]
    for fragments in (2, 3, 4):
        where = cut(parameters, fragments)
        each = [sum(p.nbytes for name, p in parameters.items() if where[name] == at) for at in range(fragments)]
        assert sent(fragments) == each * 2
    assert max(sent(2)) <= 0.6 * whole


def test_settling_meets_with_those_fragments_only_that_went_on_since():
    models = [cases.network() for _ in range(2)]

    def work(path):
        model = models[path.rank]
        optimizer, exchange = cases.sgd(model), cases.Told(Channel(path=path))
        method = DiLoCo(exchange, every=4, fragments=2)
        with attach(model, optimizer, method) as session:
            cases.train(model, optimizer, path.rank, 0, 2)  # the turn of the first fragment
            assert (method.steps, method.met) == (2, 0)
            session.settle()
            assert (method.steps, method.met) == (2, 2)
            session.settle()
            first, second = (set(call) for call in exchange.calls)
            settled = cases.weights(model)
            cases.train(model, optimizer, path.rank, 2, 4)  # the second one's turn comes when it would have come
        assert len(exchange.calls) == 3
        assert set(exchange.calls[2]) == second
        assert first | second == {name for name, _ in model.named_parameters()}
        assert not first & second
        return settled

    a, b = together(2, work)
    assert cases.same(a, b)


@pytest.mark.parametrize("codec", [None, Half(), NaturalCompression()], ids=["exact", "half", "natural"])
@pytest.mark.parametrize("overlap", [0, 1, 3, 5])
def test_resuming_is_never_having_stopped_also_with_an_exchange_under_way(overlap, codec):
    models = [cases.network(sparse=True) for _ in range(2)]

    def work(path):
        def session(model):
            stages = [] if codec is None else [Compress(codec, error_feedback=True)]
            optimizer = cases.sgd(model)
            method = DiLoCo(Channel(*stages, path=path), every=5, fragments=3, overlap=overlap)
            return optimizer, attach(model, optimizer, method)

        whole = copy.deepcopy(models[path.rank])
        optimizer, opened = session(whole)
        with opened:
            cases.train(whole, optimizer, path.rank, 0, 17)
            opened.settle()
        found = []
        for stop in range(6, 12):
            first = copy.deepcopy(models[path.rank])
            optimizer, opened = session(first)
            with opened:
                cases.train(first, optimizer, path.rank, 0, stop)
                saved = copy.deepcopy([first.state_dict(), optimizer.state_dict(), opened.state_dict()])
            second = copy.deepcopy(models[path.rank])
            second.load_state_dict(saved[0])
            optimizer, opened = session(second)
            optimizer.load_state_dict(saved[1])
            with opened:
                opened.load_state_dict(saved[2])
                cases.train(second, optimizer, path.rank, stop, 17)
                opened.settle()
            found.append(cases.weights(second))
        return cases.weights(whole), found

    for expected, found in together(2, work):
        assert all(cases.same(expected, each) for each in found)


def test_workers_cut_alike_and_a_state_of_another_cut_is_refused():
    def work(path):
        model = cases.network()
        optimizer = cases.sgd(model)
        method = DiLoCo(Channel(path=path), every=4, fragments=path.rank + 1)
        with (
            pytest.raises(ExchangeError, match=r"in fragment': 0 and 1\."),
            attach(model, optimizer, method),
        ):
            cases.train(model, optimizer, path.rank, 0, 4)

    together(2, work)

    def refused(path):
        model = cases.network()
        with attach(model, cases.sgd(model), DiLoCo(Channel(path=path), every=4, fragments=2)) as session:
            state = session.state_dict()
        with (
            attach(model, cases.sgd(model), DiLoCo(Channel(path=path), every=4)) as session,
            pytest.raises(ValueError, match="of 2 fragments, got fragments=1"),
        ):
            session.load_state_dict(state)

    together(1, refused)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fragments": 0}, "from 1 to every=4, got fragments=0"),
        ({"fragments": 5}, "from 1 to every=4, got fragments=5"),
        ({"overlap": -1}, "overlap is from 0 to every=4 steps, got -1"),
        ({"overlap": 5}, "overlap is from 0 to every=4 steps, got 5"),
        ({"blend": 1.0}, "less than 1, got blend=1.0"),
        ({"blend": -0.1}, "from 0 to less than 1, got blend=-0.1"),
    ],
)
def test_what_cannot_be_is_refused(options, text):
    def work(path):
        with pytest.raises(ValueError, match=text):
            DiLoCo(Channel(path=path), every=4, **options)

    together(1, work)


def test_a_model_of_fewer_layers_is_refused_and_nothing_stays_attached():
    def work(path):
        model = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="fragments=3 of a model that has trainable parameters in 1 layers"):
            attach(model, cases.sgd(model), DiLoCo(Channel(path=path), every=4, fragments=3))
        assert not model._forward_pre_hooks

    together(1, work)


def test_a_state_brings_its_cut_along():
    """Layers may have other sizes by now than when the training began, and would be cut otherwise."""

    def work(path):
        model = cases.network()
        optimizer, exchange = cases.sgd(model), cases.Told(Channel(path=path))
        with attach(model, optimizer, DiLoCo(exchange, every=4, fragments=2)) as session:
            state = session.state_dict()
            cut_once = state["methods"][0]["state"]["fragment"]
            turned = {name: 1 - fragment for name, fragment in cut_once.items()}
            state["methods"][0]["state"]["fragment"] = turned
            session.load_state_dict(state)
            cases.train(model, optimizer, path.rank, 0, 2)
        assert set(exchange.calls[0]) == {name for name, fragment in turned.items() if fragment == 0}

    together(1, work)
