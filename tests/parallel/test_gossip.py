"""Workers that speak with neighbours only: their mean stays, they come together as fast as the graph allows, nothing is lost."""

import time

import gossip_jobs as jobs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noctule.parallel.graphs import complete, random, ring, torus, weights
from noctule.testing.processes import Workers

WORLD = 6


@pytest.fixture(scope="module")
def workers():
    with Workers(WORLD) as group:
        yield group


def matrix(graph, meeting=0, world=WORLD):
    return weights(jobs.GRAPHS[graph](world, meeting))


def second_largest(graph):
    """Of the eigenvalues' magnitudes: how far from the mean workers stay at each meeting, at worst."""
    return float(torch.linalg.eigvalsh(matrix(graph)).abs().sort().values[-2])


@given(st.sampled_from([ring, torus, random, complete]), st.integers(1, 40), st.integers(0, 5))
def test_graphs_are_connected_and_their_weights_keep_the_mean(graph, world, meeting):
    neighbours = graph(world, meeting)
    found = weights(neighbours)
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found.sum(1), torch.ones(world, dtype=torch.float64))
    assert float(found.min()) >= -1e-12
    assert bool((torch.linalg.matrix_power(found, 4 * world * world) > 0).all())
    most = {ring: 2, torus: 4, random: 2, complete: world}[graph]
    assert all(len(others) <= most for others in neighbours)


def test_a_graph_that_is_none_is_refused():
    for neighbours in ([(1,), ()], [(0,)], [(1, 1), (0,)], [(2,), ()]):
        with pytest.raises(ValueError, match="have it as a neighbour too"):
            weights(neighbours)


@pytest.mark.parametrize("graph", jobs.GRAPHS)
def test_a_meeting_is_the_product_with_the_weights(workers, graph):
    everyone = workers.call(jobs.consensus, graph, "none", 8, WORLD)
    x = torch.stack([each["weights"] for each in everyone]).double()  # (W, meetings + 1, n)
    mean = x[:, 0].mean(0)
    for meeting in range(8):
        torch.testing.assert_close(x[:, meeting + 1], matrix(graph, meeting) @ x[:, meeting], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(x[:, meeting + 1].mean(0), mean, atol=1e-6, rtol=1e-6)
    apart = (x - mean).pow(2).sum((0, 2)).sqrt()
    if graph != "random":
        assert bool((apart[1:] <= second_largest(graph) * apart[:-1] + 1e-4).all())
    if graph == "complete":
        assert apart[1] < 1e-4
    assert apart[-1] < 0.2 * apart[0]
    for each in everyone:
        torch.testing.assert_close(each["settled"].double(), mean, atol=1e-6, rtol=1e-6)
        assert torch.equal(each["settled"], everyone[0]["settled"])


@pytest.mark.parametrize("graph", ["ring", "torus"])
@pytest.mark.parametrize(("codec", "meetings"), [("natural", 40), ("top", 250)])
def test_with_a_codec_they_come_together_too(workers, graph, codec, meetings):
    everyone = workers.call(jobs.consensus, graph, codec, meetings, WORLD)
    x = torch.stack([each["weights"] for each in everyone]).double()
    mean = x[:, 0].mean(0)
    torch.testing.assert_close(x.mean(0), mean.expand(meetings + 1, -1), atol=3e-6, rtol=1e-6)
    apart = (x - mean).pow(2).sum((0, 2)).sqrt()
    assert apart[-1] < 0.01 * apart[0]
    for rank, each in enumerate(everyone):
        assert sorted(each["public"]) == sorted(str(other) for other in {rank, *jobs.GRAPHS[graph](WORLD, 0)[rank]})
        for other, copies in each["public"].items():
            assert torch.equal(copies, everyone[int(other)]["public"][other])


def test_what_a_worker_sends_does_not_grow_with_the_workers(workers):
    for codec, least, most in (("none", 8 * 323, 8 * 323 + 100), ("natural", 2 * 323, 2 * 323 + 100)):
        for world in (3, 4, WORLD):
            found = workers.call(jobs.consensus, "ring", codec, 1, world)
            assert all(least <= each["sent"] <= most for each in found if each is not None)


@pytest.mark.parametrize("codec", jobs.CODECS)
def test_resuming_is_never_having_stopped_and_training_trains(workers, codec):
    for each in workers.call(jobs.resumed, codec):
        assert torch.equal(each["whole"], each["resumed"])
        assert sum(each["losses"][-5:]) < 0.7 * sum(each["losses"][:5])


@pytest.mark.parametrize("codec", ["none", "top"])
def test_connections_that_move_alike_and_apart(workers, codec):
    everyone = workers.call(jobs.moving, codec, True)
    assert all(torch.equal(each["weights"], everyone[0]["weights"]) for each in everyone)
    assert all("must move alike" in each for each in workers.call(jobs.moving, codec, False))


def test_what_cannot_be_is_refused(workers):
    expected = {
        "no rate": "ValueError: with TopK",
        "far": "ValueError: a worker goes a part of the way",
        "every": "ValueError: workers meet after at least one step",
        "with_random_graph": "ValueError: this graph has other neighbours at each meeting",
        "with_another_graph": "ExchangeError: workers 0 and 1 differ in 'graph'",
        "began_elsewhere": "ExchangeError: workers 0 and 1 differ in '0.weight'",
        "of_another_worker": "ValueError: this state is of a worker that knows",
    }
    for rank, found in enumerate(workers.call(jobs.wrong)):
        for what, text in expected.items():
            assert found[what].startswith(text), (what, found[what])
        late = found["another_meeting"]
        assert ("every worker must come to every meeting" in late) == (rank in (0, 1, 2)), late


def test_a_neighbour_that_dies_is_told():
    with Workers(2, group_timeout_seconds=20.0) as pair:
        pair.call(jobs.until_the_end, 3)
        running = pair.begin(jobs.until_the_end, 1_000_000)
        time.sleep(0.5)  # until they are past the handshake
        pair.kill(1)
        assert "could not finish isend and irecv with the workers [1]" in str(running.outcomes()[0])
