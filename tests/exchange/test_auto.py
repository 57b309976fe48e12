"""The cheapest way is chosen alike on all workers, again when the link changes, and nothing is lost on the way."""

from dataclasses import replace

import process_jobs as jobs
import pytest
import torch
from torch.futures import Future

from exchange_cases import KEYS, Half, given, together
from noctule.codecs import NaturalCompression
from noctule.core.exchange import Channel, Exchange, Wrapped
from noctule.exchange import Auto, Compress, LinkEstimate, Local, PowerSGD, Weigh
from noctule.exchange.ddp import _PlainPass
from noctule.testing.link import Link, available, shaped_network
from noctule.testing.processes import Workers

FAST, SLOW = LinkEstimate(1e-6, 1e13), LinkEstimate(1e-3, 1e3)


class Around(Wrapped):
    def __init__(self, inner):
        self._inner = inner

    @property
    def inner(self):
        return self._inner


class Plain(Around):
    """Without a cost but the bytes, like a collective of the system."""

    def rehearse(self, tensors, keys):
        return replace(self.inner.rehearse(tensors, keys), seconds=0.0)


def candidates(path):
    return {
        "plain": Plain(Channel(path=path)),
        "half": Channel(Compress(Half()), path=path),
        "natural": Channel(Compress(NaturalCompression(), error_feedback=True), path=path),
    }


def test_a_fast_link_takes_the_plain_way_and_a_slow_one_the_smallest():
    def work(path):
        x, found = [torch.randn(10_000, generator=torch.Generator().manual_seed(path.rank))], []
        for link in (FAST, SLOW):
            auto = Auto(candidates(path), probe=lambda link=link: link, turns=0)
            assert auto.why() == "nothing was exchanged yet"
            auto(x, ["x"])
            found.append((auto.choice, auto.costs, auto.why()))
        return found

    everyone = together(2, work)
    assert everyone[0] == everyone[1]
    (fast, _, why), (slow, costs, _) = everyone[0]
    assert (fast, slow) == ("plain", "natural")
    assert why.startswith("plain, because the link has 8e+07 Mbit/s, 0.001 ms:")
    assert costs["plain"].sent_bytes > 1.9 * costs["half"].sent_bytes > 3.8 * 0.9 * costs["natural"].sent_bytes


class Clock:
    """Seconds that pass only when they are added."""

    now = 0.0

    def __call__(self):
        return self.now


class Slowed(Around):
    """Another exchange over a link that may become slower."""

    def __init__(self, inner, clock, seconds):
        super().__init__(inner)
        self.clock, self.seconds = clock, seconds

    def __call__(self, tensors, keys):
        self.clock.now += self.seconds
        return self.inner(tensors, keys)


def test_a_link_that_changes_is_noticed_and_nothing_is_lost():
    def work(path):
        link, clock = [SLOW], Clock()
        ways = {name: Slowed(way, clock, 0.01) for name, way in candidates(path).items() if name != "natural"}
        auto = Auto(ways, probe=lambda: link[0], every=4, turns=0, clock=clock)
        got, choices = [], []
        for call in range(36):
            if call == 12:
                link[0] = FAST
            if call in (12, 24):  # the second time nothing but the times changes
                for way in ways.values():
                    way.seconds += 0.02
            got.append(auto(given(path.rank, call), KEYS))
            choices.append(auto.choice)
        return got, choices, auto.release()

    everyone = together(2, work)
    assert everyone[0][1] == everyone[1][1]
    choices = everyone[0][1]
    assert choices[:12] == ["half"] * 12
    assert choices[-8:] == ["plain"] * 8
    check_conserved(everyone, 36)


@pytest.mark.parametrize(
    ("plain", "half", "choice"), [(0.0, 0.03, "plain"), (0.102, 0.1, "plain"), (0.1, 0.03, "half")]
)
def test_those_whose_prices_are_near_show_what_they_take(plain, half, choice):
    """The price says that the half is cheapest, and that the others are near enough."""

    def work(path):
        clock, seconds = Clock(), {"plain": plain, "half": half, "natural": 0.3}
        ways = {name: Slowed(way, clock, seconds[name]) for name, way in candidates(path).items()}
        auto = Auto(ways, probe=lambda: SLOW, every=1000, turns=3, clock=clock)
        got, choices = [], []
        for call in range(30):
            got.append(auto(given(path.rank, call), KEYS))
            choices.append(auto.choice)
        return got, choices, auto.release(), {name: len(turns) for name, turns in auto.seconds.items()}, auto.settled

    everyone = together(2, work)
    _, choices, _, turns, settled = everyone[0]
    assert all(each[1] == choices and each[3] == turns and each[4] for each in everyone)
    assert choices[-8:] == [choice] * 8
    assert set(choices) == {"plain", "half", "natural"}
    assert turns["natural"] == 1  # so slow that it got no other
    assert settled
    check_conserved(everyone, 30)


@pytest.mark.parametrize(("pause", "choice"), [(0.0, "half"), (0.2, "plain")])
def test_the_plain_one_stays_where_whole_steps_are_hardly_slower(pause, choice):
    def work(path):
        clock, seconds = Clock(), {"plain": 0.025, "half": 0.015, "natural": 0.1}
        ways = {name: Slowed(way, clock, seconds[name]) for name, way in candidates(path).items()}
        auto = Auto(ways, probe=lambda: SLOW, turns=1, clock=clock)
        for call in range(10):
            auto(given(path.rank, call), KEYS)
            clock.now += pause  # the rest of the step
        return auto.choice, auto.settled

    assert together(2, work) == [(choice, True)] * 2


@pytest.mark.parametrize("idle", [False, True])
def test_debts_change_hands_as_gradients_not_times_a_workers_samples(idle):
    """The half is left for the plain one, which pays; one that has no samples just then pays later."""

    def work(path):
        weigh, got, choices = Weigh(64.0), [], []
        ways = {
            "plain": Plain(Channel(weigh, path=path)),
            "half": Channel(weigh, Compress(Half()), path=path),
        }
        link = [SLOW]
        auto = Auto(ways, probe=lambda: link[0], turns=0)
        for call in range(4):
            if call == 2:
                link[0], auto.link = FAST, None
            weigh.n = 0.0 if idle and call == 2 and path.rank == 0 else 64.0
            (total,) = auto([torch.ones(1000)], ["x"])
            got.append((float(total[0]), float(total[-1])))
            choices.append(auto.choice)
        assert choices == ["half", "half", "plain", "plain"]
        assert not auto.release()
        return got

    # Each owes 2 of the last number. Of a worker without samples the others' mean is the aggregate.
    paid = [(1.0, 3.0), (1.0, 2.0)] if idle else [(1.0, 3.0), (1.0, 1.0)]
    assert together(2, work) == [[(1.0, 0.0), (1.0, 0.0), *paid]] * 2


def check_conserved(everyone, calls):
    for at, key in enumerate(KEYS):
        sent = sum(given(rank, call)[at].double() for rank in range(2) for call in range(calls))
        delivered = sum(got[at].double() for got in everyone[0][0]) * 2
        owed = sum(each[2][key].double() for each in everyone if key in each[2])
        torch.testing.assert_close(delivered + owed, sent, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_over_a_step_that_nobody_takes_what_a_left_candidate_owed_is_not_lost(fails):
    def work(path):
        link, (plain, half, _) = [SLOW], candidates(path).values()
        auto = Auto({"plain": plain, "half": half}, probe=lambda: link[0], turns=0)
        got = [auto(given(path.rank, 0), KEYS)]
        before = half.state_dict()["stages"][0]["owed"]
        assert before
        link[0], auto.link = FAST, None  # the plain one is next
        bad = given(path.rank, 1)
        if fails:
            bad = bad[:-1]  # as many keys as before
            with pytest.raises(ValueError, match="argument 2 is longer"):
                auto(bad, KEYS)
        else:
            bad[0][0, 0] = torch.inf
            auto(bad, KEYS)
        after = auto.state_dict()["owed"]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        got.append(auto(given(path.rank, 1), KEYS))
        return got, None, auto.release()

    check_conserved(together(2, work), 2)


def test_a_state_is_taken_back_with_what_is_owed():
    def work(path):
        first, second = (Auto(candidates(path), probe=lambda: SLOW, turns=0) for _ in range(2))
        first(given(path.rank), KEYS)
        second.load_state_dict(first.state_dict())
        assert second.choice == first.choice == "natural"
        a, b = first(given(path.rank, 1), KEYS), second(given(path.rank, 1), KEYS)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        with pytest.raises(ValueError, match="of the candidates"):
            Auto({"plain": Channel(path=path)}, probe=lambda: SLOW).load_state_dict(first.state_dict())

    together(2, work)


def test_every_exchange_that_can_be_priced():
    def work(path):
        power = PowerSGD(2, inner=Channel(path=path))
        work = power.rehearse([torch.randn(50, 40), torch.randn(10)], ["w", "b"])
        assert work.sent_bytes == 4 * (2 * 50 + 10 + 2 * 40)
        assert work.rounds == 2
        assert power.owed == {}
        with pytest.raises(NotImplementedError, match="does not say what it takes"):
            Exchange.rehearse(power, [], [])
        for candidates, bad in (({"plain": power}, {"every": 0}), ({"plain": power}, {"turns": -1}), ({}, {})):
            with pytest.raises(ValueError, match="choosing needs"):
                Auto(candidates, probe=lambda: SLOW, **bad)

    together(2, work)


def probes(links, times):
    """What two workers measure of each link, which must be the same."""
    with shaped_network(2, link=links[0]) as network, Workers(2, network=network) as workers:
        for link in links:
            network.change(link)
            for _ in range(times):
                first, second = workers.call(jobs.probed)
                assert first == second
                yield link, *first


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_a_shaped_link_is_measured():
    """However busy the machine is, messages take no less than the delay, and are no faster than the link."""
    for link, latency, speed in probes([Link(megabits=20, delay_ms=25)], 1):
        assert latency * 1e3 >= link.delay_ms
        assert speed * 8e-6 < 1.3 * link.megabits


@pytest.mark.slow
@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_measurements_of_a_shaped_link_are_near_on_a_quiet_machine():
    for link in (Link(megabits=100, delay_ms=5), Link(megabits=20, delay_ms=25)):
        found = [measured for _, *measured in probes([link], 3)]
        latency, speed = min(latency for latency, _ in found), max(speed for _, speed in found)
        assert speed * 8e-6 > 0.6 * link.megabits
        assert latency * 1e3 <= 2 * link.delay_ms + 10


def test_a_pass_of_all_reduces_is_over_when_the_last_has_arrived_not_when_the_last_bucket_has():
    begun: list[Future] = []

    class Slow:
        def begin(self, x):
            begun.append(Future())
            return begun[-1]

    class Bucket:
        def __init__(self, last):
            self.is_last, self.buffer = (lambda: last), (lambda: torch.ones(3))

    auto = Auto({"plain": Channel(path=Local.together(1)[0])}, probe=lambda: FAST)
    one_pass = _PlainPass(auto, Slow(), {})
    large, small = one_pass.ready(Bucket(last=False)), one_pass.ready(Bucket(last=True))
    begun[1].set_result([torch.ones(3)])
    assert small.wait().tolist() == [1.0] * 3
    assert auto.calls == 0
    begun[0].set_result([torch.ones(3)])
    assert large.wait().tolist() == [1.0] * 3
    assert auto.calls == 1
