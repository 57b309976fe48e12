"""A shard without sockets: clocks, bounds, snapshots, and messages that are not what they must be."""

import json
import re
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from push_pull_jobs import ADAGRAD, MOMENTUM, PLAIN

from noctule.core.errors import ExchangeError
from noctule.parallel.server.assign import assign
from noctule.parallel.server.handler import ShardHandler
from noctule.parallel.server.shard import Shard
from noctule.transport.messages import read, write

FACTS = {"codec": "Exact()"}
thoroughly = pytest.mark.parametrize("share", [0.5, pytest.param(1, marks=pytest.mark.slow)])
"""Half of the examples of a law in a quick run, all of them in a slow one."""


def check(law, *strategies, examples):
    settings(max_examples=int(examples), deadline=None)(given(*strategies)(law))()


def shard(optimizer=PLAIN, *, bound=None, warm_start=0, **options):
    made = Shard(optimizer, **options)
    made.seed({"x": torch.zeros(3)}, facts=FACTS, bound=bound, warm_start=warm_start)
    return made


def joined(workers, **options):
    made = shard(workers=workers, **options)
    for worker in range(workers):
        assert made.join(worker, f"session {worker}", FACTS)
        made.pull(worker)
    return made


class Sender:
    """A worker that sends the requests that a test asks for, with its own serials and numbers."""

    def __init__(self, handler, worker, again=""):
        self.handler, self.worker, self.serial, self.number = handler, worker, 0, 0
        self.session = f"session {worker}{again}"

    def send(self, kind, *tensors, **header):
        self.serial += 1
        message = {"kind": kind, "session": self.session, "serial": self.serial, **header}
        return self.handler.handle(self.worker, b"%d" % self.worker, write(message, tensors))

    def push(self, x=(1.0, 0.0, 0.0), *, number=None, names=("x",)):
        self.number += number is None
        frame = torch.tensor(x).numpy().tobytes()
        number = self.number if number is None else number
        return self.send("push", *[frame] * len(names), number=number, names=list(names), pull=True)


def senders(made, count, **options):
    handler = ShardHandler(made, **options)
    return [Sender(handler, worker) for worker in range(count)]


def header(replies):
    ((_, frames),) = replies
    return read(frames)[0]


def test_bound_0_averages_the_pushes_of_a_clock_and_applies_them_once():
    made = joined(3, bound=0, optimizer=MOMENTUM)
    p = torch.nn.Parameter(torch.zeros(3))
    plain = MOMENTUM([p])
    for step in range(1, 4):
        gradients = [torch.full((3,), float(worker * step)) for worker in range(3)]
        for worker in (2, 0, 1):
            made.push(worker, step, {"x": gradients[worker]})
            assert made.may_run(worker) == (worker == 1)
            assert made.version == (3 * step if worker == 1 else 3 * step - 3)
        p.grad = torch.stack(gradients).mean(0)
        plain.step()
        for worker in range(3):
            torch.testing.assert_close(made.pull(worker)["x"], p.detach())
    assert made.staleness == {0: 9}


def test_without_a_bound_every_push_is_applied_at_once_and_its_staleness_is_the_pushes_of_others():
    made = joined(3)
    for worker, number in ((1, 1), (1, 2), (2, 1)):
        made.push(worker, number, {"x": torch.ones(3)})
    assert made.staleness == {0: 2, 2: 1}
    made.push(0, 1, {"x": torch.ones(3)})
    assert made.states[0].staleness == 3
    made.pull(0)
    made.push(0, 2, {"x": torch.ones(3)})
    assert made.states[0].staleness == 0
    assert made.parameters["x"].tolist() == [-5.0] * 3


@thoroughly
def test_the_bound_is_never_broken_and_never_makes_a_worker_wait_in_vain(share):
    check(bound_is_kept, st.data(), st.integers(0, 3), st.integers(1, 4), examples=80 * share)


def bound_is_kept(data, bound, count):
    everyone = senders(joined(count, bound=bound), count)  # more may join
    handler = everyone[0].handler
    running, waiting, pushed = set(range(count)), set(), [0] * count
    for _ in range(data.draw(st.integers(0, 60))):
        if not running:
            break
        worker, what = data.draw(st.sampled_from(sorted(running))), data.draw(st.integers(0, 19))
        if what == 1 and len(everyone) < 6:
            worker = len(everyone)
            everyone.append(Sender(handler, worker))
            replies, gone = everyone[worker].send("join", facts=FACTS), set()
            pushed.append(min(pushed[other] for other in running | waiting))
            waiting.add(worker)
        elif what == 0:
            replies = everyone[worker].send("leave", number=everyone[worker].number)
            running.remove(worker)
            gone = {worker}
        else:
            pushed[worker] += 1
            replies, gone = everyone[worker].push(), set()
            running.remove(worker)
            waiting.add(worker)
        answered = {int(route) for route, frames in replies if "error" not in read(frames)[0]}
        assert len(answered) == len(replies)
        living = running | waiting
        for each in answered - gone:
            assert pushed[each] - min(pushed[other] for other in living) <= bound
        waiting -= answered
        running |= answered - gone
        for each in waiting:
            assert pushed[each] - min(pushed[other] for other in living) > bound
        assert running or not living
    made = handler.shard
    total = sum(sender.number for sender in everyone)
    assert made.version + len(made._held) == total
    if bound > 0:
        torch.testing.assert_close(made.parameters["x"].detach(), torch.tensor([-float(total), 0.0, 0.0]))


class Crowd:
    """Workers that join, leave, die and return at any time; each waits for its replies."""

    def __init__(self, count, **options):
        self.now, self.count, self.bound = 0.0, count, options["bound"]
        self.shard = shard(workers=count, patience_seconds=10, clock=lambda: self.now, **options)
        self.handler, self.senders, self.seen = ShardHandler(self.shard), {}, {}
        self.door, self.running, self.waiting, self.gone, self.silent = set(), set(), set(), set(), set()

    def comes(self, worker):
        """As a new process."""
        self.senders[worker] = Sender(self.handler, worker, f" at {self.now}")
        self.gone.discard(worker)
        self.silent.discard(worker)
        self.door.add(worker)
        self.receive(self.senders[worker].send("join", facts=FACTS))

    def pushes(self, worker):
        """A worker that was silent returns with its push."""
        self.running.discard(worker)
        self.silent.discard(worker)
        self.waiting.add(worker)
        self.receive(self.senders[worker].push())

    def leaves(self, worker):
        self.running.remove(worker)
        self.gone.add(worker)
        self.receive(self.senders[worker].send("leave", number=self.senders[worker].number))

    def dies(self, worker):
        """It ends, or is silent for longer than the shard's patience; a silent one that was not waiting may push again."""
        (self.silent if worker in self.running else self.gone).add(worker)
        self.running.discard(worker)
        self.waiting.discard(worker)
        self.passes()

    def passes(self):
        """More time than the shard's patience: the others send a message."""
        self.now += 11
        for worker in self.running | self.waiting | self.door:
            self.senders[worker].send("ask", about=-1)
        self.receive(self.handler.tick())

    def receive(self, replies):
        for route, frames in replies:
            worker, answer = int(route), read(frames)[0]
            assert "error" not in answer
            assert "lost" not in answer
            if worker in self.door:
                self.door.remove(worker)
                self.waiting.add(worker)
                self.receive(self.senders[worker].send("pull"))
            elif worker in self.waiting:
                self.waiting.remove(worker)
                self.running.add(worker)

    def check(self):
        states, warm_start = self.shard.states, self.shard.warm_start
        slowest = min((state.clock for state in states.values() if state.live), default=0)
        warming = states.keys() == {0} and states[0].clock < warm_start
        complete = len(states) >= self.count
        for worker in self.running:
            assert warming or (complete and states[worker].clock - slowest <= self.bound)
        for worker in self.waiting:  # for a worker that is slower or has not joined
            assert not complete or states[worker].clock - slowest > self.bound
        assert not (complete and self.waiting) or self.running
        assert not self.door or not states or (warming and 0 in self.running)
        self.seen |= {(worker, state.session): state.seen for worker, state in states.items()}
        total = sum(self.seen.values())
        assert self.shard.version + len(self.shard._held) == total  # no push is lost
        if self.bound > 0:
            assert self.shard.parameters["x"].tolist() == [-float(total), 0.0, 0.0]


@thoroughly
def test_the_bound_holds_when_workers_join_leave_die_or_return_in_a_warm_start_or_later(share):
    warm, steps = st.sampled_from([0, 1, 3, 6]), st.sampled_from([5, 20, 50])
    check(crowd_keeps_the_bound, st.data(), st.integers(0, 2), st.integers(1, 3), warm, steps, examples=150 * share)


def crowd_keeps_the_bound(data, bound, count, warm, steps):
    crowd = Crowd(count, bound=bound, warm_start=warm)
    for _ in range(steps):
        here = crowd.running | crowd.waiting
        could = (
            *((crowd.pushes, each) for each in sorted(crowd.running | crowd.silent)),
            *((crowd.comes, each) for each in sorted({*range(count + 1)} - here - crowd.door)),
            *((crowd.leaves, each) for each in sorted(crowd.running)),
            *((crowd.dies, each) for each in sorted(here)),
        )
        does, worker = data.draw(st.sampled_from(could))
        does(worker)
        crowd.check()
    while crowd.running:
        crowd.leaves(min(crowd.running))
        crowd.check()


@pytest.mark.parametrize("bound", [0, 1, None])
def test_a_warm_start_is_over_for_good_when_others_are_let_in(bound):
    now = [0.0]
    made = shard(workers=3, bound=bound, warm_start=5, patience_seconds=10, clock=lambda: now[0])
    first, second, third = senders(made, 3)
    first.send("join", facts=FACTS)
    first.push()
    assert not second.send("join", facts=FACTS)
    now[0] = 11
    assert [route for route, _ in first.handler.tick()] == [b"1"]  # worker 0 is silent
    returned = Sender(first.handler, 0, " again")
    assert returned.send("join", facts=FACTS)
    assert not returned.send("pull")  # nor is it to be alone any more
    replies = third.send("join", facts=FACTS)
    assert {route for route, _ in replies} == {b"0", b"2"}  # the worker that joined, and the one that waited for it
    ahead = 0
    while ahead < 5 and returned.push():
        ahead += 1
    assert ahead == (5 if bound is None else bound)
    for sender in (second, third) * (0 if bound is None else 1):
        sender.push()
    assert made.version + len(made._held) == 1 + returned.number + second.number + third.number
    assert not made._held


def test_a_worker_that_leaves_or_falls_silent_is_not_waited_for_and_may_come_back():
    now = [0.0]
    first, second, third = everyone = senders(joined(3, bound=1, patience_seconds=10, clock=lambda: now[0]), 3)
    made = first.handler.shard
    assert first.push()
    assert not first.push()
    assert third.send("leave", number=0)
    assert first.handler.tick() == []
    now[0] = 9
    assert "waiting" in header(first.send("ask", about=first.serial))
    now[0] = 11  # the second has sent nothing
    ((route, _),) = first.handler.tick()
    assert route == b"0"
    for _ in range(5):
        assert first.push()
    assert header(second.push())["staleness"] == 7
    assert made.states[1].live
    assert made.states[1].clock == made.states[0].clock + 1  # it does not hold up the others
    assert sum(state.live for state in made.states.values()) == len(everyone) - 1


def test_a_worker_that_dies_while_it_waits_does_not_come_back_by_that():
    now = [0.0]
    first, second, third = senders(joined(3, bound=1, patience_seconds=10, clock=lambda: now[0]), 3)
    second.push()
    assert not second.push()
    for now[0] in (4.0, 8.0, 12.0, 16.0):
        first.send("ask", about=0)
        third.send("ask", about=0)
        first.handler.tick()
    assert not first.handler.shard.states[1].live
    assert [bool(first.push()), bool(first.push())] == [True, False]


def test_a_held_push_of_a_worker_that_died_counts():
    made = joined(3, bound=0)
    made.push(0, 1, {"x": torch.ones(3)})
    made.leave(0)
    made.push(1, 1, {"x": torch.ones(3)})
    made.leave(2)
    assert made.version == 2
    assert made.parameters["x"].tolist() == [-1.0] * 3


def test_others_wait_for_the_warm_start():
    made = shard(workers=2, bound=0, warm_start=3)
    first, second = senders(made, 2)
    assert not second.send("join", facts=FACTS)
    assert "warm start" in header(second.send("ask", about=second.serial))["why"]
    assert header(first.send("join", facts=FACTS))["seen"] == 0
    for _ in range(2):
        assert len(first.push()) == 1
    assert {route for route, _ in first.push()} == {b"0", b"1"}  # the third opens the door, and both may begin
    assert made.states[1].clock == 3
    assert not first.push()
    assert len(second.push()) == 2


def test_a_push_is_applied_once_however_often_it_is_sent_and_a_gap_is_noticed():
    (sender,) = senders(joined(1), 1)
    made = sender.handler.shard
    sender.push()
    for _ in range(3):
        assert header(sender.push(number=1))["version"] == 1
    assert header(sender.push(number=3)) == {"protocol": 2, "serial": 5, "lost": True}
    assert made.parameters["x"].tolist() == [-1.0, 0.0, 0.0]
    assert made.staleness == {0: 1}


@pytest.mark.parametrize("bound", [None, 0, 2])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAGRAD])
def test_a_snapshot_is_all_there_is(tmp_path, bound, optimizer):
    def pushes(everyone, start, stop):
        for step in range(start, stop):
            for sender in everyone:
                sender.push([float(step), 1.0, -2.0])

    whole = senders(joined(2, bound=bound, optimizer=optimizer), 2)
    pushes(whole, 0, 9)
    first = senders(joined(2, bound=bound, optimizer=optimizer), 2, folder=tmp_path, snapshot_every=1)
    pushes(first, 0, 4)
    first[0].push([4.0, 1.0, -2.0])  # with bound 0 it is held when the shard ends
    handler = ShardHandler(Shard(optimizer, workers=2), folder=tmp_path)
    for sender in first:
        sender.handler = handler
    first[1].push([4.0, 1.0, -2.0])
    if bound == 0:
        first[0].push([4.0, 1.0, -2.0], number=5)  # it asks again for the answer that it did not get
    pushes(first, 5, 9)
    ours, theirs = handler.shard, whole[0].handler.shard
    assert torch.equal(ours.parameters["x"], theirs.parameters["x"])
    assert (ours.version, ours.staleness) == (18, theirs.staleness)
    assert [state.clock for state in ours.states.values()] == [9, 9]


@contextmanager
def full(folder):
    """Nothing can be written to it."""
    away = folder.with_name("away")
    folder.rename(away)
    folder.write_text("no folder")
    yield
    folder.unlink()
    away.rename(folder)


@pytest.mark.parametrize("how", ["it closes", "time passes", "pushes come"])
def test_a_snapshot_that_failed_is_retried(tmp_path, how):
    now, folder = [0.0], tmp_path / "shard"
    made = Shard(PLAIN, clock=lambda: now[0])
    first, second = senders(made, 2, folder=folder, snapshot_every=2)
    handler = first.handler
    frame = torch.zeros(3).numpy().tobytes()
    first.send("seed", frame, shapes={"x": [3]}, facts=FACTS, bound=None, warm_start=0)
    for sender in (first, second):
        sender.send("join", facts=FACTS)
    with full(folder):
        first.push()
        with pytest.warns(UserWarning, match="could not save .*; the shard continues"):
            assert header(first.push())["saved"] == 0
        with pytest.warns(UserWarning, match="could not save"):
            assert header(first.send("leave", number=2))["saved"] == 0  # and it forgets them all the same
    now[0] = 4.0
    handler.tick()
    assert made.states[0].saved == 0
    now[0] = 5.0
    match how:
        case "it closes":
            handler.close()
        case "time passes":
            handler.tick()
        case "pushes come":
            second.push()
            second.push()
    assert made.states[0].saved == 2
    again = Shard(PLAIN)
    ShardHandler(again, folder=folder)
    assert again.version == made.version >= 2
    written = [(path, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    now[0] = 100.0
    handler.tick()
    handler.close()
    assert [(path, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())] == written  # nothing is left to write


def test_what_is_not_finite_is_refused_and_changes_nothing():
    first, second = senders(joined(2, bound=0), 2)
    made = first.handler.shard
    assert "'x' that is NaN or infinite" in header(first.push((1.0, float("nan"), 0.0)))["error"]
    assert made.states[0].clock == made.states[0].seen == 0
    first.number = 0
    assert not first.push()
    assert len(second.push()) == 2
    assert made.parameters["x"].tolist() == [-1.0, 0.0, 0.0]


def test_a_worker_that_joins_again_replaces_its_former_self():
    made = joined(2, bound=1)
    made.push(0, 1, {"x": torch.ones(3)})
    assert made.join(0, "another", FACTS)
    assert made.states[0].clock == 1
    assert not made.note_message(0, "session 0")
    with pytest.raises(ExchangeError, match="has joined again from elsewhere"):
        made.join(0, "session 0", FACTS)


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ([], "begins with a header"),
        ([b""], "header in JSON"),
        ([b"\xff\xfe"], "header in JSON"),
        ([b"[" * 100_000], "header in JSON"),
        ([b"[1, 2]"], "a JSON object"),
        ([b"{" + b" " * (1 << 22) + b"}"], "at most 4,194,304 bytes"),
        ([b'{"protocol": 99}'], "version 2 of the protocol and the other 99"),
        ([b'{"protocol": 2}'], "must say 'kind'"),
        (write({"kind": "dance", "serial": 1, "session": "session 0"}), "no request 'dance'"),
        (write({"kind": "pull", "serial": "1", "session": "session 0"}), "must say 'serial', int"),
        (write({"kind": "push", "serial": 1, "session": "session 0"}), "must say 'number'"),
        (write({"kind": "join", "serial": 1, "session": "s", "facts": {"codec": "TopK"}}), "differs .* in 'codec'"),
    ],
)
def test_a_message_that_cannot_be_is_answered_by_what_is_wrong(message, answer):
    (sender,) = senders(joined(1), 1)
    found = header(sender.handler.handle(0, b"0", message))["error"]
    assert re.search(answer, found), found
    assert header(sender.push())["version"] == 1


@pytest.mark.parametrize(
    ("names", "frames", "answer"),
    [
        (["x"], [b"123"], "torn"),
        (["x"], [b"1234" * 4], "torn"),
        (["x"], [b"1234" * 3] * 2, "1 gradients came with 2 frames"),
        (["x"], [], "1 gradients came with 0 frames"),
        (["y"], [b"1234" * 3], r"keeps \['x'\], and a push is of \['y'\]"),
        (["x", "x"], [b"1234" * 3] * 2, "a push is of"),
        ([["x"]], [b"1234" * 3], "a push is of"),
        (["x"], [b"1234" * 300], "at most 1,000 bytes of tensors, got 1,200"),
    ],
)
def test_a_push_that_cannot_be_is_answered_by_what_is_wrong(names, frames, answer):
    (sender,) = senders(joined(1), 1, max_bytes=1000)
    found = header(sender.send("push", *frames, number=1, names=names, pull=True))["error"]
    assert re.search(answer, found), found
    assert sender.handler.shard.version == 0
    assert header(sender.push())["version"] == 1


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "a"]), inner, max_size=2),
    max_leaves=5,
)
KINDS = st.sampled_from(["join", "seed", "push", "pull", "leave", "ask", ""])
FIELDS = st.sampled_from(["number", "names", "pull", "facts", "shapes", "bound", "warm_start", "about"])


@thoroughly
def test_no_message_breaks_a_shard(share):
    fields, frames = st.dictionaries(FIELDS, JUNK), st.lists(st.binary(max_size=13), max_size=3)
    check(shard_answers, st.booleans(), KINDS, fields, frames, examples=150 * share)


def shard_answers(seeded, kind, fields, frames):
    made = joined(1) if seeded else Shard(PLAIN)
    handler = ShardHandler(made)
    message = {"protocol": 2, "session": "session 0", "serial": 7, **fields, "kind": kind}
    replies = handler.handle(0, b"0", [json.dumps(message).encode(), *frames])
    handler.tick()
    assert len(replies) <= 1
    assert made.version <= 1
    if seeded:
        assert made.join(0, "session 0", FACTS)
        assert header(Sender(handler, 0).send("pull"))["version"] == made.version


def test_parameters_are_assigned_by_their_size_and_alike_everywhere():
    sizes = {f"p{n}": n for n in range(1, 40)}
    dealt = assign(sizes, 3)
    assert sorted(name for names in dealt for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in dealt]
    assert max(loads) - min(loads) <= 3
    assert assign(dict(reversed(sizes.items())), 3) == dealt
    with pytest.raises(ValueError, match="2 parameters cannot be assigned to 3"):
        assign({"a": 1, "b": 2}, 3)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="workers=0"):
        Shard(PLAIN, workers=0)
    with pytest.raises(ValueError, match="snapshot_every=0"):
        ShardHandler(Shard(PLAIN), snapshot_every=0)
