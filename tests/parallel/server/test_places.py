"""What becomes of gradients, state and workers' knowledge when connections move at a shard; without sockets."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from push_pull_jobs import ADAM, MOMENTUM, PLAIN

from noctule.core.errors import ExchangeError
from noctule.core.optim import carry_state
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.parallel.server.handler import ShardHandler
from noctule.parallel.server.moves import KEPT, Move, TopologyLog, from_frame, to_frame
from noctule.parallel.server.shard import Shard
from noctule.transport.messages import read, write

SHAPE = (4, 5)
FACTS = {"codec": "Exact()"}


def shard(topology, optimizer=PLAIN, **options):
    made = Shard(optimizer, **options)
    weights = {"values": torch.zeros(topology.size), "bias": torch.zeros(3)}
    made.seed(weights, facts=FACTS, bound=options.pop("bound", None), places={"values": topology})
    for worker in range(made.workers):
        assert made.join(worker, f"session {worker}", FACTS)
    return made


def drawn(data, topology, most=3):
    """A move of these connections."""
    count = data.draw(st.integers(1, min(most, topology.size, topology.places - topology.size)))
    dropped = data.draw(st.permutations(range(topology.size)))[:count]
    missing = sorted(set(range(topology.places)) - set(topology.keys().tolist()))
    grown = data.draw(st.permutations(missing))[:count]
    return Move(torch.tensor(sorted(dropped)), torch.tensor(sorted(grown)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_gradient_finds_the_connections_that_are_still_the_same_and_no_others(data):
    topology = Topology.random(SHAPE, 9, generator=torch.Generator().manual_seed(1))
    made = shard(topology)
    serial = iter(range(10**6))
    alive = {key: next(serial) for key in topology.keys().tolist()}  # a connection that is grown again is another one
    history, expected, bias, outdated = [dict(alive)], {}, 0.0, 0
    for number in range(1, data.draw(st.integers(2, 15))):
        if data.draw(st.booleans()):
            log = made.logs["values"]
            move = drawn(data, log.topology)
            keys = log.topology.keys().tolist()
            first = torch.arange(1.0, move.grown.numel() + 1)
            made.move(0, number, {"values": (move, first)})
            for slot in move.dropped.tolist():
                expected.pop(alive.pop(keys[slot]), None)
            for key, value in zip(move.grown.tolist(), first.tolist(), strict=True):
                alive[key] = next(serial)
                expected[alive[key]] = value
            history.append(dict(alive))
        else:
            lag = data.draw(st.integers(0, min(len(history) - 1, KEPT + 2)))
            seen = history[-1 - lag]
            gradient = torch.tensor([float(serial) + 1 for _, serial in sorted(seen.items())])
            made.push(
                0, number, {"values": gradient, "bias": torch.ones(3)}, versions={"values": len(history) - 1 - lag}
            )
            bias -= 1
            outdated += lag > KEPT
            for each in seen.values() if lag <= KEPT else ():
                if each in alive.values():
                    expected[each] = expected.get(each, 0.0) - (each + 1)
    keys = made.logs["values"].topology.keys().tolist()
    assert keys == sorted(alive)
    assert made.parameters["values"].tolist() == [expected.get(alive[key], 0.0) for key in keys]
    assert made.parameters["bias"].tolist() == [bias] * 3
    assert made.weights is not None
    assert made.weights.outdated == outdated


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from([MOMENTUM, ADAM]))
def test_the_optimizers_state_goes_where_it_goes_in_plain_training(data, optimizer):
    topology = Topology.random(SHAPE, 9, generator=torch.Generator().manual_seed(2))
    made = shard(topology, optimizer)
    p = torch.nn.Parameter(torch.zeros(9))
    plain = optimizer([p])
    for number in range(1, 9):
        if number % 3 == 0:
            log = made.logs["values"]
            move = drawn(data, log.topology)
            _, remap = move.of(log.topology)
            made.move(0, number, {"values": (move, torch.zeros(move.grown.numel()))})
            with torch.no_grad():
                p.copy_(remap.apply(p.detach()))
            carry_state(plain, p, p, remap)
        else:
            p.grad = torch.randn(9, generator=torch.Generator().manual_seed(number))
            made.push(0, number, {"values": p.grad.clone()})
            plain.step()
        assert torch.equal(made.parameters["values"], p)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_worker_that_gets_what_it_missed_has_todays_connections(data):
    log = TopologyLog(Topology.random(SHAPE, 9, generator=torch.Generator().manual_seed(3)))
    mine, version = log.topology, 0
    for _ in range(data.draw(st.integers(1, 12))):
        move = drawn(data, log.topology)
        log.note(move, *move.of(log.topology))
        if data.draw(st.integers(0, 3)) == 0:
            log = TopologyLog.from_state_dict(copy.deepcopy(log.state_dict()))
        if data.draw(st.booleans()):
            missed = log.missed(version)
            assert (missed is None) == (log.version - version > KEPT)
            for each in missed or ():
                mine, _ = Move.read(each.write(mine), mine).of(mine)
            mine, version = (log.topology if missed is None else mine), log.version
            assert mine == log.topology


def test_a_move_is_what_lies_between():
    a, b = (Topology.random((30, 40), 200, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    new, remap = Move.between(a, b).of(a)
    assert new == b
    assert torch.equal(remap.old_slot, Remap.between(a, b).old_slot)


def test_pushes_that_are_held_for_their_round_follow_too():
    topology = Topology.from_keys((1, 6), torch.tensor([0, 2, 4]))
    made = Shard(PLAIN, workers=2)
    made.seed({"values": torch.zeros(3)}, facts=FACTS, bound=0, places={"values": topology})
    for worker in range(2):
        made.join(worker, f"session {worker}", FACTS)
    made.push(1, 1, {"values": torch.tensor([2.0, 4.0, 6.0])}, versions={"values": 0})
    made.move(0, 1, {"values": (Move(torch.tensor([1]), torch.tensor([5])), torch.tensor([0.5]))})
    assert made.parameters["values"].tolist() == [0, 0, 0.5]
    made.push(0, 2, {"values": torch.tensor([20.0, 40.0, 60.0])}, versions={"values": 1})
    assert made.parameters["values"].tolist() == [-11, -23, -29.5]


def send(handler, kind, *frames, worker=0, **header):
    message = {"kind": kind, "session": f"session {worker}", "serial": 1, **header}
    ((_, answer),) = handler.handle(worker, b"0", write(message, frames))
    return read(answer)


def frames_of(move, topology, first=None):
    first = torch.zeros(move.grown.numel()) if first is None else first
    return [*move.write(topology), first.numpy().tobytes()]


def test_a_move_is_made_once_and_kept_at_once(tmp_path):
    topology = Topology.from_keys((1, 6), torch.tensor([0, 2, 4]))
    made = shard(topology, MOMENTUM)
    handler = ShardHandler(made, folder=tmp_path, snapshot_every=1000)
    move = Move(torch.tensor([0]), torch.tensor([1]))
    message = {"number": 1, "names": ["values"], "versions": {"values": 0}}
    for _ in range(2):
        header, _ = send(handler, "move", *frames_of(move, topology), **message)
        assert header["saved"] == 1
        assert made.logs["values"].version == 1
    assert send(handler, "move", *frames_of(move, topology), **{**message, "number": 5})[0]["lost"]
    again = Shard(MOMENTUM)
    ShardHandler(again, folder=tmp_path)
    assert again.logs["values"].topology == made.logs["values"].topology
    assert again.states[0].seen == 1


def test_what_a_pull_brings_is_what_is_missing():
    topology = Topology.from_keys((1, 300), torch.arange(0, 300, 3))
    made = shard(topology)
    handler = ShardHandler(made)
    header, frames = send(handler, "pull", versions={"values": 0})
    assert header["places"] == []
    assert len(frames) == 2
    move = Move(torch.tensor([4, 7]), torch.tensor([1, 299]))
    send(handler, "move", *frames_of(move, topology), number=1, names=["values"], versions={"values": 0})
    header, frames = send(handler, "pull", versions={"values": 0})
    assert header["places"] == [["values", 1, 1]]
    assert sum(map(len, frames[2:])) == 4 * 4  # two slots and two keys
    assert send(handler, "pull", versions={"values": 1})[0]["places"] == []
    header, frames = send(handler, "pull", versions={"values": -1})
    assert header["places"] == [["values", 1, None]]
    assert from_frame(frames[2], 300).tolist() == made.logs["values"].topology.keys().tolist()


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"worker": 1}, "moved by worker 0, and this is worker 1"),
        ({"versions": {"values": 1}}, "of version 1 of 'values', where this shard has 0"),
        ({"versions": {"values": 7}}, "of version 7 of 'values', where this shard has 0"),
        ({"versions": {}}, "which version of the connections of 'values'"),
        ({"versions": {"values": "0"}}, "which version of the connections of 'values'"),
        ({"names": ["bias"]}, "where this shard has none"),
        ({"names": ["values", "values"]}, "2 layers came with 3 frames"),
        ({"names": []}, "0 layers came with 3 frames"),
        ({"frames": [b"1", b"", b""]}, "torn"),
        ({"move": Move(torch.tensor([0, 1]), torch.tensor([1]))}, "2 connections are dropped and 1 grown"),
        ({"move": Move(torch.tensor([0]), torch.tensor([2]))}, "there already"),
        ({"move": Move(torch.tensor([0]), torch.tensor([6]))}, "below 6"),
        ({"move": Move(torch.tensor([3]), torch.tensor([1]))}, "below 3"),
        ({"move": Move(torch.tensor([1, 0]), torch.tensor([1, 3]))}, "sorted"),
        ({"move": Move(torch.tensor([0, 0]), torch.tensor([1, 3]))}, "each once"),
        ({"first": torch.tensor([float("nan")])}, "NaN or infinite"),
        ({"first": torch.zeros(2)}, "not that tensor"),
    ],
)
def test_a_move_that_cannot_be_changes_nothing(change, answer):
    topology = Topology.from_keys((1, 6), torch.tensor([0, 2, 4]))
    made = shard(topology, MOMENTUM, workers=2)
    made.push(0, 1, {"values": torch.ones(3)})
    handler, before = ShardHandler(made), copy.deepcopy(made.state_dict())
    move = change.pop("move", Move(torch.tensor([0]), torch.tensor([1])))
    frames = change.pop("frames", None) or frames_of(move, topology, change.pop("first", None))
    header, _ = send(
        handler, "move", *frames, **{"number": 2, "names": ["values"], "versions": {"values": 0}, **change}
    )
    assert answer in header["error"]
    assert str(made.state_dict()["weights"]) == str(before["weights"])
    assert made.states[0].seen == 1


def test_a_server_that_came_back_without_what_a_worker_has_seen_says_so():
    made = shard(Topology.from_keys((1, 6), torch.tensor([0, 2, 4])))
    with pytest.raises(ExchangeError, match="has seen version 3 of a layer's connections, and this server is at 0"):
        made.push(0, 1, {"values": torch.ones(3)}, versions={"values": 3})
    assert made.parameters["values"].tolist() == [0, 0, 0]
    assert made.states[0].seen == 0


@given(st.sets(st.integers(0, 2**33 - 1), max_size=20))
def test_lists_of_numbers_are_what_was_written(numbers):
    below = 2**33 if numbers and max(numbers) >= 2**31 else 2**31
    frame = to_frame(torch.tensor(sorted(numbers), dtype=torch.int64), below)
    assert from_frame(frame, below).tolist() == sorted(numbers)
    assert len(frame) == len(numbers) * (8 if below > 2**31 else 4)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"places": {"values": [1, 6, 1]}}, "places of a matrix of shape"),
        ({"places": {"values": [2**31, 1]}}, "places of a matrix of shape"),
        ({"places": {"values": "1"}}, "cannot have the shape"),
        ({"places": {"bias": [1, 6]}}, "has 3 places, and the shape"),
        ({"places": {}}, "3 tensors came for 2"),
    ],
)
def test_first_places_that_cannot_be_are_refused(changes, answer):
    handler = ShardHandler(Shard(PLAIN))
    weights = [torch.zeros(3).numpy().tobytes(), torch.zeros(2).numpy().tobytes()]
    header = {"facts": FACTS, "shapes": {"values": [3], "bias": [2]}, "places": {"values": [1, 6]}, "warm_start": 0}
    places = to_frame(torch.tensor([0, 2, 4]), 6)
    assert answer in send(handler, "seed", *weights, places, bound=None, **{**header, **changes})[0]["error"]
    assert "error" not in send(handler, "seed", *weights, places, bound=None, **header)[0]
