"""A parameter server with mistakes and processes that end: nothing is lost, nothing counts twice, all is said."""

import dataclasses
import json
import threading
import time
from pathlib import Path
from unittest import mock

import push_pull_jobs as jobs
import pytest
import torch
import zmq
from moving_jobs import places, sparse
from push_pull_jobs import MOMENTUM, PLAIN, batch, network, together, train, work

from noctule import RunFolder, set_
from noctule.codecs import TopK
from noctule.core.errors import ExchangeError
from noctule.core.method import attach
from noctule.core.remap import Remap
from noctule.core.topology import Topology
from noctule.data import Batches, Dataset
from noctule.parallel import PushPull, Ticket
from noctule.parallel.server.listen import ShardSockets, serve
from noctule.report import Journal
from noctule.testing.processes import Workers
from noctule.train.fit import fit
from noctule.transport.messages import read, write


def begin(method, width=8):
    """Open a session and close it."""
    model = network(width=width)
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), method):
        pass


def await_file(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("workers", "kills"),
    [(2, [9]), *(pytest.param(workers, [5, 9, 15, 20, 26], marks=pytest.mark.slow) for workers in (1, 2, 3))],
)
def test_a_server_that_is_killed_restarts_and_nothing_is_lost_or_counted_twice(tmp_path, workers, kills):
    steps, shards = 10 + kills[-1], 2
    with serve(MOMENTUM, shards=shards, workers=workers) as server:
        methods = [PushPull(server.ticket(rank), bound=0) for rank in range(workers)]
        expected = together(
            [lambda r=r, m=m: work(m, [batch(r, n) for n in range(steps)]) for r, m in enumerate(methods)]
        )
    with Workers(1, group=False) as processes:
        processes.begin(jobs.run_server, str(tmp_path), shards, workers)
        for rank in range(workers):
            await_file(tmp_path / f"worker-{rank}.json")
        done = [0] * workers

        def restart(*, after):
            while min(done) < after:
                time.sleep(0.002)
            processes.kill(0)
            processes.start(0)
            processes.begin(jobs.run_server, str(tmp_path), shards, workers)

        def job(rank):
            def count():
                done[rank] += 1
                time.sleep(0.01)

            method = PushPull(Ticket.load(tmp_path / f"worker-{rank}.json"), bound=0)
            return work(method, [batch(rank, n) for n in range(steps)], count)

        killer = threading.Thread(target=lambda: [restart(after=after) for after in kills])
        killer.start()
        found = together([lambda r=r: job(r) for r in range(workers)])
        killer.join()
        processes.kill(0)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with serve(MOMENTUM, shards=shards, workers=workers, folder=tmp_path) as server:
        assert server.versions == [steps * workers] * shards  # a worker that leaves makes it keep everything
        for p, (name, _) in zip(found[0], network().named_parameters(), strict=True):
            assert torch.equal(p, next(s.parameters[name] for s in server.shards if name in s.parameters))


@pytest.mark.slow
def test_a_server_that_stands_still_for_a_while_is_waited_for(tmp_path):
    plain = network()
    expected = train(plain, MOMENTUM(plain.parameters()), [batch(0, n) for n in range(20)])
    with Workers(1, group=False) as processes:
        processes.begin(jobs.run_server, str(tmp_path), 2, 1)
        await_file(tmp_path / "worker-0.json")
        done = []

        def stop_and_resume():
            while len(done) < 5:
                time.sleep(0.005)
            processes.stop(0)
            time.sleep(5)
            processes.resume(0)

        freezer = threading.Thread(target=stop_and_resume)
        freezer.start()
        method = PushPull(Ticket.load(tmp_path / "worker-0.json"))
        found = work(method, [batch(0, n) for n in range(20)], lambda: (done.append(None), time.sleep(0.01)))
        freezer.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(method.staleness.values()) == 40


def test_a_server_without_a_folder_has_lost_its_weights_and_says_so(tmp_path):
    server = serve(MOMENTUM)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = PushPull(server.ticket(0), timeout_seconds=5)
    keys = {"server": server._keys.server, "workers": server._keys.workers, "addresses": server.addresses}
    with pytest.raises(ExchangeError, match="no weights any more: it was started again without its folder"):  # noqa: PT012, SIM117
        with attach(model, optimizer, method):
            train(model, optimizer, [batch(0, 0)])
            server.close()
            (tmp_path / "keys.json").write_text(json.dumps(keys))
            with serve(MOMENTUM, folder=tmp_path):
                train(model, optimizer, [batch(0, 1)])


@pytest.mark.parametrize("wrong", ["server_key", "public_key"])
def test_a_peer_without_the_key_gets_nothing(wrong):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    with serve(MOMENTUM) as server:
        begin(PushPull(server.ticket(0)))
        ticket = server.ticket(0)
        if wrong == "server_key":
            stranger = dataclasses.replace(ticket, server_key=public)
        else:
            stranger = dataclasses.replace(ticket, public_key=public, secret_key=secret)
        with pytest.raises(
            ExchangeError, match=r"shard 0 at tcp://.* not answered a join for 0\.5 s.*without a key gets"
        ):
            begin(PushPull(stranger, timeout_seconds=0.5))
        bare = zmq.Context()
        socket = bare.socket(zmq.DEALER)
        socket.connect(ticket.addresses[0])
        socket.send(b"hello")
        assert not socket.poll(300)
        bare.destroy(linger=0)
        assert server.shards[0].states[0].seen == 0
        begin(PushPull(ticket))


def test_a_worker_is_whom_its_key_says():
    with serve(MOMENTUM) as server:
        begin(PushPull(server.ticket(0)))
        begin(PushPull(dataclasses.replace(server.ticket(3), worker=0)))
        assert sorted(server.shards[0].states) == [0, 3]


def test_nonsense_is_answered_and_the_server_continues():
    with serve(MOMENTUM, max_bytes=10_000) as server:
        sockets = ShardSockets(server.ticket(1))

        def ask(*frames):
            sockets.send(0, list(frames))
            ((_, answer),) = sockets.receive(5)
            return read(answer)[0]["error"]

        assert "header in JSON" in ask(b"nonsense")
        assert "header in JSON" in ask(b"")
        assert "no request 'dance'" in ask(*write({"kind": "dance", "serial": 1, "session": "s"}))
        assert "at most 10,000 bytes" in ask(*write({"kind": "push", "serial": 1, "session": "s"}, [b"x" * 6000] * 2))
        assert "first weights come from worker 0" in ask(
            *write(
                {"kind": "seed", "serial": 1, "session": "s", "facts": {}, "shapes": {}, "bound": None, "warm_start": 0}
            )
        )
        assert "header in JSON" in ask(*[b"x"] * 2000)
        sockets.send(0, [b"x" * (5 << 20)])  # cut off, before memory is taken
        assert not sockets.receive(0.3)
        sockets.close()
        begin(PushPull(server.ticket(0)))
    with (
        serve(MOMENTUM, max_bytes=10_000) as server,
        pytest.raises(ExchangeError, match=r"seed of .* bytes to shard 0 .* which takes 10,000"),
    ):
        begin(PushPull(server.ticket(0)), width=2000)


def test_workers_that_do_not_fit_get_an_error_that_says_where():
    with serve(MOMENTUM, shards=2, workers=2) as server:
        with pytest.raises(ExchangeError, match=r"a pull for 1 s: it says: only 1 of 2 workers have joined"):
            begin(PushPull(server.ticket(0), timeout_seconds=1))
        ticket = server.ticket(1)
        fewer = dataclasses.replace(ticket, addresses=ticket.addresses[:1])
        for method, width, match in (
            (PushPull(ticket), 9, r"'0\.weight': float32 \(9, 6\), where it has float32 \(8, 6\)"),
            (PushPull(ticket, bound=1), 8, "'bound': 1, where it has None"),
            (PushPull(ticket, warm_start=1), 8, "'warm_start': 1, where it has 0"),
            (PushPull(ticket, codec=TopK(0.5)), 8, r"'codec': .TopK\(.*where it has .Exact\(\)"),
            (PushPull(fewer), 8, "'shards': 1, where it has 2"),
        ):
            with pytest.raises(ExchangeError, match=match):
                begin(method, width)


SECONDS = 1.0
EVERY_2 = {"push_every": 2, "timeout_seconds": SECONDS}


def trained_until_the_server_is_gone(folder):
    """A worker whose connections moved when its server was gone: its model and method, its state, the server's last places."""
    model = sparse()
    optimizer, server = PLAIN(model.parameters()), serve(PLAIN, folder=folder)
    method = PushPull(server.ticket(0), **EVERY_2)
    with attach(model, optimizer, set_(every=3, seed=1), method) as session:
        train(model, optimizer, [batch(0, n) for n in range(2)])
        agreed = places(model)
        server.close()
        began = time.monotonic()
        with pytest.raises(ExchangeError, match="has not answered a pull"):
            train(model, optimizer, [batch(0, 2)])  # its gradient was to be pushed with the next one
        assert time.monotonic() - began >= SECONDS
        assert places(model) == agreed
        model(batch(0, 3)[0])
        assert places(model) != agreed
        with mock.patch.object(method.clients, "wait", side_effect=AssertionError("the server was asked again")):
            state = session.state_dict()
    return model, optimizer, method, state, agreed


def accrued_with_places(method, model):
    """What is accrued for each sparse layer, and the topology that it belongs to."""
    return {name: (x.clone(), model[int(name[0])].topology) for name, x in method.accrued.items() if "val" in name}


def has_followed(method, model, accrued):
    """What was accrued for connections that are still there is kept, and nothing else."""
    for name, (x, topology) in accrued.items():
        remap = Remap.between(topology, model[int(name[0])].topology)
        assert x.any()
        assert 0 < remap.grown < x.numel()
        torch.testing.assert_close(method.accrued[name], remap.apply(x), rtol=0, atol=0)


def test_after_a_server_was_gone_the_same_worker_still_has_what_it_accrued(tmp_path):
    model, optimizer, method, _, agreed = trained_until_the_server_is_gone(tmp_path)
    accrued = accrued_with_places(method, model)
    with serve(PLAIN, folder=tmp_path), attach(model, optimizer, set_(every=3, seed=1), method):
        assert places(model) == agreed
        has_followed(method, model, accrued)


def test_after_a_server_was_gone_a_new_process_has_what_was_accrued(tmp_path):
    model, _, method, state, agreed = trained_until_the_server_is_gone(tmp_path)
    accrued = accrued_with_places(method, model)
    kept = state["methods"][1]["state"]
    assert [Topology.from_state_dict(kept["places"][name]) for name in ("0.values", "2.values")] == places(model)
    again = sparse(seed=7)
    with serve(PLAIN, folder=tmp_path) as server:
        optimizer, method = PLAIN(again.parameters()), PushPull(server.ticket(0), **EVERY_2)
        with attach(again, optimizer, set_(every=3, seed=1), method) as session:
            session.load_state_dict(state)
            assert places(again) == agreed
            has_followed(method, again, accrued)
            assert server.versions == [1]
            train(again, optimizer, [batch(0, 3)])
            assert server.versions == [2]


class Ending:
    """Batches; at one of them the server is gone."""

    def __init__(self, batches, server, at):
        self.batches, self.server, self.at = batches, server, at

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, start=0):
        for n, each in enumerate(self.batches.epoch(epoch, start), start):
            if n == self.at:
                self.server.close()
            yield each


@pytest.mark.parametrize("push_every", [1, 2])
def test_fit_leaves_a_checkpoint_when_the_server_is_gone_and_continues_when_it_is_back(tmp_path, push_every):
    data = Dataset(torch.randn(32, 6), torch.arange(32) % 3, name="toy", classes=3)
    folder = RunFolder.create(tmp_path / "run", recipe="test", options={}, seed=0)
    journal, batches = Journal(folder, "toy"), Batches(data, 8, seed=0)

    def run(server, model, source):
        method = PushPull(server.ticket(0), push_every=push_every, pull_every=push_every, timeout_seconds=1.0)
        moving, optimizer = set_(every=2, seed=1), torch.optim.SGD(model.parameters(), lr=0.1)
        return fit(model, optimizer, source, validation=data, epochs=2, methods=[moving, method], journal=journal)

    server = serve(MOMENTUM, folder=tmp_path / "server", snapshot_every=1)
    with pytest.raises(ExchangeError, match="has not answered"):
        run(server, sparse(), Ending(batches, server, at=1))  # its second step is one at which connections move
    step, state = journal.checkpoints.latest() or (0, {})
    assert (step, state["progress"]["batch"]) == (2, 2)
    with serve(MOMENTUM, folder=tmp_path / "server") as server:
        model = sparse(seed=5)
        assert run(server, model, batches).step == 8
        assert server.versions[0] >= 6 // push_every
        assert places(model) == [log.topology for log in server.shards[0].logs.values()]


def test_a_worker_that_leaves_while_the_disk_is_full_loses_nothing_that_the_server_had(tmp_path):
    with serve(MOMENTUM, folder=tmp_path) as server:
        ticket = server.ticket(0)
        begin(PushPull(ticket))
        (tmp_path / "shard-0").rename(tmp_path / "away")
        (tmp_path / "shard-0").write_text("no folder: nothing can be written to it")
        with pytest.warns(UserWarning, match="could not save"):
            expected = work(PushPull(ticket), [batch(0, n) for n in range(3)])
        (tmp_path / "shard-0").unlink()
        (tmp_path / "away").rename(tmp_path / "shard-0")
    with serve(MOMENTUM, folder=tmp_path) as server:
        assert server.versions == [3]
        assert all(torch.equal(a, b) for a, b in zip(work(PushPull(ticket), []), expected, strict=True))


def test_a_shard_that_is_not_there_is_named():
    with serve(MOMENTUM) as server:
        ticket = dataclasses.replace(server.ticket(0), addresses=(*server.addresses, "tcp://127.0.0.1:9"))
        with pytest.raises(ExchangeError, match=r"shard 1 at tcp://127\.0\.0\.1:9 has not answered a join for 2 s"):
            begin(PushPull(ticket, timeout_seconds=2.0))


def test_a_worker_that_dies_is_waited_for_only_so_long():
    with serve(MOMENTUM, workers=2, patience_seconds=1.0) as server:
        dying = ShardSockets(server.ticket(1))

        def joins_and_dies():
            facts = await_facts(server)
            dying.send(0, write({"kind": "join", "serial": 1, "session": "s", "facts": facts}))
            assert dying.receive(5)
            dying.close()

        method = PushPull(server.ticket(0), bound=0)
        began = time.monotonic()
        together(
            [lambda: work(method, [batch(0, n) for n in range(5)]), joins_and_dies]
        )  # within its timeout of a minute
        assert time.monotonic() - began > 0.9
        assert not server.shards[0].states[1].live
        assert server.versions == [5]


def test_a_worker_that_is_too_slow_is_named_when_the_time_is_over():
    with serve(MOMENTUM, workers=2) as server:
        slow = ShardSockets(server.ticket(1))

        def joins():
            slow.send(0, write({"kind": "join", "serial": 1, "session": "s", "facts": await_facts(server)}))
            assert slow.receive(5)

        method = PushPull(server.ticket(0), bound=0, timeout_seconds=1.5)
        with pytest.raises(
            ExchangeError, match=r"push for 1\.5 s: it says: worker 1 is 1 pushes behind and the bound is 0"
        ):
            together([lambda: work(method, [batch(0, n) for n in range(5)]), joins])
        slow.close()


def await_facts(server):
    deadline = time.monotonic() + 10
    while not server.shards[0].facts:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return server.shards[0].facts


def test_secrets_stay_secret(tmp_path):
    with serve(MOMENTUM, folder=tmp_path) as server:
        ticket = server.ticket(0)
        ticket.save(tmp_path / "ticket.json")
        assert Ticket.load(tmp_path / "ticket.json") == ticket
        for name in ("ticket.json", "keys.json"):
            assert (tmp_path / name).stat().st_mode & 0o077 == 0
        for secret in (ticket.secret_key, server._keys.server[1]):
            assert secret not in repr(ticket) + repr(server) + repr(server.__dict__["addresses"])
        with pytest.raises(ExchangeError, match="leads nowhere") as error:
            begin(PushPull(dataclasses.replace(ticket, server_key="short")))
        assert ticket.secret_key not in str(error.value)
    Path(tmp_path, "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no ticket"):
        Ticket.load(tmp_path / "wrong.json")


def test_a_folder_is_of_one_server(tmp_path):
    with serve(MOMENTUM, folder=tmp_path) as server:
        with pytest.raises(ExchangeError, match=r"cannot listen at .* Does another server run"):
            serve(MOMENTUM, folder=tmp_path)
        begin(PushPull(server.ticket(0)))
    with pytest.raises(ExchangeError, match="of 1 shards, not 2"):
        serve(MOMENTUM, folder=tmp_path, shards=2)
