"""A link has the bandwidth, delay and loss that were asked for, counts what passes, freezes, and leaves nothing behind."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from link_sockets import (
    Receiving,
    connection,
    datagrams_that_arrive,
    place_of,
    receive_datagrams,
    round_trip_ms,
    stream,
)

from noctule.testing.link import Link, Network, available, remove_leftovers, shaped_network

REASON = available()
needs_network = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LINK = Link(megabits=100, delay_ms=5)
LIMITED = Link(megabits=100)


@pytest.fixture(scope="module")
def pair():
    with shaped_network(2, link=LINK) as network:
        yield network


@pytest.fixture
def link_of_pair(pair: Network):
    """Change the link of the pair for one test."""
    yield lambda link: pair.change(link)
    pair.change(LINK)


def namespaces() -> set[str]:
    return {path.name for path in Path("/run/netns").iterdir()}


def runs(process: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(seconds: float, condition) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@needs_network
@pytest.mark.parametrize(
    ("link", "size"),
    [(LINK, 4_000_000), (Link(megabits=20, delay_ms=25), 1_500_000), (Link(megabits=400, delay_ms=1), 12_000_000)],
    ids=lambda value: f"{value.megabits:g} Mbit" if isinstance(value, Link) else None,
)
def test_bandwidth_is_never_above_that_of_the_link(pair, link_of_pair, link, size):
    link_of_pair(link)
    payload = (1500 - 52) / 1500  # of a packet with the headers of IP and TCP
    seconds, _ = stream(pair, size)
    assert seconds > size * 8e-6 / (link.megabits * payload) + link.delay_ms / 1000  # whatever else runs here


@pytest.mark.slow
@needs_network
@pytest.mark.parametrize(
    ("megabits", "delay_ms", "size"), [(20, 25, 1_500_000), (100, 5, 4_000_000), (400, 1, 12_000_000)]
)
def test_a_quiet_machine_uses_the_bandwidth_of_the_link(pair, link_of_pair, megabits, delay_ms, size):
    link_of_pair(Link(megabits=megabits, delay_ms=delay_ms))
    payload = (1500 - 52) / 1500
    closest = min(abs(stream(pair, size)[1] / (megabits * payload) - 1) for _ in range(5))
    assert closest < 0.15


@needs_network
def test_the_kernel_limits_bandwidth_without_a_relay_and_in_use():
    with shaped_network(2, link=Link(megabits=100)) as network:
        assert network.relay is None
        for megabits, size in ((100, 4_000_000), (400, 12_000_000), (20, 1_500_000)):
            network.change(link := Link(megabits=megabits))
            pieces = 4 * link.counted_bytes(2)  # what may pass at once, after a pause, at the sender and at the hub
            seconds, _ = stream(network, size)
            assert seconds > (size - pieces) * 8e-6 / megabits  # never faster, whatever else runs here
        network.change(Link())
        unlimited = min(stream(network, 12_000_000)[0] for _ in range(3))
        assert unlimited < 12_000_000 * 8e-6 / 100  # faster than the first link allows, also on a slow machine


@pytest.mark.slow
@needs_network
def test_a_quiet_machine_uses_what_the_kernel_lets_through():
    with shaped_network(2, link=Link(megabits=100)) as network:
        for megabits, size in ((100, 4_000_000), (400, 12_000_000), (20, 1_500_000)):
            network.change(Link(megabits=megabits))
            assert min(stream(network, size)[0] for _ in range(4)) < 1.25 * size * 8e-6 / megabits


@needs_network
@pytest.mark.parametrize("delay_ms", [0.5, 5, 25])
def test_a_round_trip_takes_the_delay_twice(pair, link_of_pair, delay_ms):
    link_of_pair(Link(megabits=100, delay_ms=delay_ms))
    assert 2 * delay_ms <= min(round_trip_ms(pair) for _ in range(2))


@pytest.mark.slow
@needs_network
@pytest.mark.parametrize("delay_ms", [0.5, 5, 25])
def test_on_a_quiet_machine_a_round_trip_takes_little_more(pair, link_of_pair, delay_ms):
    link_of_pair(Link(megabits=100, delay_ms=delay_ms))
    assert min(round_trip_ms(pair) for _ in range(5)) < 2 * delay_ms + 4


@needs_network
@pytest.mark.parametrize("link", [Link(), LIMITED, LINK], ids=["bridge", "limited", "relay"])
def test_bytes_are_counted_as_sent(link):
    size = 2_000_000
    with shaped_network(2, link=link) as network:
        assert [network.bytes_sent(rank) for rank in (0, 1)] == [0, 0]  # the system itself says nothing
        stream(network, size)
        headers = 52 * math.ceil(size / (link.counted_bytes(2) - 52))
        for counted in (network.bytes_sent(0), network.bytes_received(1)):
            assert size < counted
            assert counted == pytest.approx(size + headers, rel=0.03)
        assert 0 < network.bytes_sent(1) < 0.15 * size  # acknowledgements


@needs_network
@pytest.mark.parametrize("link", [Link(), LIMITED, Link(delay_ms=1)], ids=["bridge", "limited", "relay"])
def test_a_network_is_ready_when_it_is_there(link):
    for _ in range(8):
        with shaped_network(2, link=link) as network:
            assert datagrams_that_arrive(network, 1) == {0}


@needs_network
@pytest.mark.parametrize("link", [Link(), LIMITED, LINK], ids=["bridge", "limited", "relay"])
def test_a_frozen_link_lets_nothing_through_and_a_thawed_one_all(link):
    data = os.urandom(3_000_000)
    with shaped_network(2, link=link) as network, connection(network) as (near, far):
        near.sendall(data[:100_000])
        receiving = Receiving(far, len(data))
        assert within(5, lambda: len(receiving.data) == 100_000)
        network.freeze()
        sending = threading.Thread(target=near.sendall, args=(data[100_000:],), daemon=True)
        sending.start()
        sending.join(0.4)
        assert len(receiving.data) == 100_000
        network.thaw()
        receiving.join(20)
        assert receiving.data == data


@needs_network
def test_what_is_sent_while_a_shaped_link_is_frozen_waits(pair):
    with place_of(pair, 1):
        far = socket.socket(type=socket.SOCK_DGRAM)
    with place_of(pair, 0):
        near = socket.socket(type=socket.SOCK_DGRAM)
    with near, far:
        far.bind((pair.addresses[1], 0))
        pair.freeze()
        for number in range(100):
            near.sendto(number.to_bytes(4, "little"), far.getsockname())
        assert not receive_datagrams(far, quiet_seconds=0.2)
        pair.thaw()
        assert receive_datagrams(far, quiet_seconds=0.5) == set(range(100))


@needs_network
def test_packets_are_lost_as_often_as_asked_and_the_same_ones_with_the_same_seed(pair):
    count = 800
    assert len(datagrams_that_arrive(pair, count)) == count
    seen = []
    for seed in (1, 1, 2):
        with shaped_network(2, link=Link(loss=0.2, seed=seed)) as network:
            seen.append(datagrams_that_arrive(network, count))
    for arrived in seen:
        assert 1 - len(arrived) / count == pytest.approx(0.2, abs=0.05)
    assert seen[0] == seen[1] != seen[2]


@needs_network
def test_three_workers_reach_each_other_and_two_share_the_line_of_the_third():
    with shaped_network(3, link=Link(megabits=60, delay_ms=2)) as star:
        for sender in range(3):
            for receiver in {0, 1, 2} - {sender}:
                with connection(star, sender, receiver) as (near, far):
                    near.sendall(b"hello")
                    assert far.recv(5, socket.MSG_WAITALL) == b"hello"
        size = 2_000_000
        with connection(star, 0, 2) as (near_0, far_0), connection(star, 1, 2) as (near_1, far_1):
            begin = time.monotonic()
            receiving = [Receiving(far_0, size), Receiving(far_1, size)]
            senders = [threading.Thread(target=near.sendall, args=(bytes(size),)) for near in (near_0, near_1)]
            for thread in senders:
                thread.start()
            for thread in [*senders, *receiving]:
                thread.join(20)
            taken = time.monotonic() - begin
        assert [len(r.data) for r in receiving] == [size, size]
        assert taken > 2 * size * 8e-6 / 60  # one line each would take half


@needs_network
def test_opposite_directions_do_not_share():
    size, megabits, taken = 400_000, 2, []  # so slow that it hardly matters what else the machine has to do
    with shaped_network(2, link=Link(megabits=megabits, delay_ms=5)) as network:
        while len(taken) < 3 and min(taken, default=99.0) > 1.6 * size * 8e-6 / megabits:
            with connection(network, 0, 1) as (near, far):
                there, back = Receiving(far, size), Receiving(near, size)
                begin = time.monotonic()
                senders = [threading.Thread(target=end.sendall, args=(bytes(size),)) for end in (near, far)]
                for thread in senders:
                    thread.start()
                for thread in [*senders, there, back]:
                    thread.join(20)
                taken.append(time.monotonic() - begin)
            assert len(there.data) == len(back.data) == size
    assert min(taken) < 1.6 * size * 8e-6 / megabits  # one after another would take twice


@needs_network
@pytest.mark.parametrize("link", [Link(), LIMITED, LINK], ids=["bridge", "limited", "relay"])
def test_nothing_is_left_after_an_error(link):
    before = namespaces()
    seen: list[tuple[Network, subprocess.Popen]] = []

    def fail() -> None:
        with shaped_network(2, link=link) as network:
            sleeping = subprocess.Popen([*network.command(1), "sleep", "100"])
            seen.append((network, sleeping))
            assert set(network.namespaces) <= namespaces() - before
            assert within(5, lambda: str(sleeping.pid) in ip_pids(network, 1))
            network.freeze()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    ((network, sleeping),) = seen
    assert not namespaces() & {*network.namespaces, network.hub}
    assert sleeping.wait(timeout=5) == -signal.SIGKILL
    assert network.relay is None or network.relay.returncode is not None


def ip_pids(network: Network, rank: int) -> list[str]:
    return subprocess.check_output(["ip", "netns", "pids", network.namespaces[rank]], text=True).split()


@needs_network
def test_a_relay_that_was_killed_is_named_and_leaves_nothing():
    with shaped_network(2, link=LINK) as network:
        assert network.relay
        network.relay.kill()
        network.relay.wait()
        with pytest.raises(RuntimeError, match="has ended"):
            network.freeze()
        with pytest.raises(TimeoutError), connection(network, seconds=0.3):
            pass
    assert not namespaces() & {*network.namespaces}


HANGING = """
import time
from noctule.testing.link import Link, shaped_network
with shaped_network(2, link=Link(delay_ms=1)) as network:
    if FROZEN: network.freeze()
    print(*network.namespaces, network.relay.pid, flush=True)
    time.sleep(100)
"""


@needs_network
@pytest.mark.parametrize("frozen", [False, True])
def test_leftovers_of_a_killed_run_are_removed_and_living_networks_are_not(pair, frozen):
    code = HANGING.replace("FROZEN", str(frozen))
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout
    *names, relay = run.stdout.readline().split()
    run.kill()
    run.communicate()
    assert set(names) <= namespaces()
    assert frozen or within(5, lambda: not runs(int(relay)))  # it goes with whom it served
    remove_leftovers()
    assert not namespaces() & set(names)
    assert within(5, lambda: not runs(int(relay)))
    assert set(pair.namespaces) <= namespaces()
    round_trip_ms(pair)


@needs_network
def test_the_command_runs_once_for_each_worker_and_fails_with_it(tmp_path):
    link = [sys.executable, "-m", "noctule.testing.link", "--workers", "3", "--megabits", "50", "--delay-ms", "1"]
    script = 'echo "$RANK of $WORLD_SIZE" > $RANK; [ $RANK != 2 ] || exit 7'
    done = subprocess.run([*link, "--", "sh", "-c", script], cwd=tmp_path, timeout=60)
    assert done.returncode == 7
    assert sorted(p.read_text().strip() for p in tmp_path.iterdir()) == ["0 of 3", "1 of 3", "2 of 3"]


@needs_network
@pytest.mark.parametrize("link", [LINK, Link(loss=0.1)], ids=["delay", "loss"])
def test_a_bridge_takes_on_no_delay_and_no_loss(link):
    with shaped_network() as network, pytest.raises(ValueError, match="without delay or loss"):
        network.change(link)


@pytest.mark.parametrize(
    "wrong",
    [{"megabits": 0}, {"megabits": -1}, {"delay_ms": -1}, {"loss": 1}, {"loss": -0.1}, {"mtu": 100}, {"mtu": 70_000}],
    ids=str,
)
def test_a_link_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Link(**wrong)


@pytest.mark.parametrize("workers", [-1, 0, 1, 201])
def test_a_network_of_too_few_or_too_many_is_refused(workers):
    with pytest.raises(ValueError, match="workers="):
        shaped_network(workers).__enter__()


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs root")
def test_available_gives_the_reason_where_no_network_can_be_made():
    code = (
        "from noctule.testing.link import available, shaped_network; print(available()); shaped_network().__enter__()"
    )
    environment = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "apt-get install iproute2" in done.stdout
    assert "RuntimeError: no network can be made here: there is no ip command" in done.stderr


def test_links_do_not_need_torch():
    code = "import sys, noctule.testing.link, noctule.testing.relay; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})
