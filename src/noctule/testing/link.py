"""Links of given bandwidth, delay, loss or freeze between network namespaces on one machine.

Every worker has a namespace of its own with one interface, one address, and an up-link and a down-link to a hub. The hub is a
bridge of the kernel, which also limits bandwidth (tbf), at almost no cost. Delays and losses need a process
(`noctule.testing.relay`) that carries packets between TUN devices, since many kernels come without netem; it uses part of a
core. Both need Linux, root and iproute2: see `available`.

    python -m noctule.testing.link --megabits 100 --delay-ms 5 -- python train.py
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from noctule.testing.namespaces import PREFIX, available, ip, remove, remove_leftovers, tc

__all__ = ["Link", "Network", "available", "remove_leftovers", "shaped_network"]

_INTERFACE = "link0"
_serial = itertools.count()
_OWN_QUEUE = 1000
"""Length in packets of the send queue of a worker's interface, the default of Linux."""
_PIECE, _PIECE_SECONDS = 65_536, 0.002
"""Bytes of TCP that the kernel passes on as one piece by default, and the time of a piece where bandwidth is limited: with single
packets eight workers on two cores would spend most of their time on packets."""


@dataclass(frozen=True)
class Link:
    """Bandwidth, delay and loss between any two workers; ValueError for impossible values."""

    megabits: float | None = None
    """Bandwidth of each worker's up-link and of its down-link, in Mbit/s of IP packets; None for no limit."""
    delay_ms: float = 0.0
    """Delay from one worker to another, one way: half of the round trip."""
    loss: float = 0.0
    """Share of the packets that are lost."""
    mtu: int | None = None
    """Bytes of the largest packet with its headers; None for 1500, or more on fast links (see `packet_bytes`)."""
    seed: int = 0
    """Seed of the random losses."""

    def __post_init__(self) -> None:
        if self.megabits is not None and not 0 < self.megabits < float("inf"):
            raise ValueError(f"megabits={self.megabits}: a bandwidth is positive, or None for no limit")
        if not 0 <= self.delay_ms < float("inf"):
            raise ValueError(f"delay_ms={self.delay_ms}: a delay is zero or more")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss={self.loss}: the share of lost packets is from 0 to below 1")
        if self.mtu is not None and not 576 <= self.mtu <= 65_000:
            raise ValueError(f"mtu={self.mtu}: the largest packet has from 576 to 65000 bytes")

    @property
    def shaped(self) -> bool:
        """Whether the link has a limit of bandwidth, a delay or losses."""
        return self.megabits is not None or self.delay_ms > 0 or self.loss > 0

    @property
    def relayed(self) -> bool:
        """Whether the link needs the relay process: the kernel's bridge has no delay and no loss."""
        return self.delay_ms > 0 or self.loss > 0

    @property
    def queue_seconds(self) -> float:
        """Length of a queue, after which packets are dropped: four round trips, at least 20 ms and 150 kB."""
        return max(8 * self.delay_ms / 1000, 0.02, 1.2 / self.megabits if self.megabits else 0.0)

    def packet_bytes(self, workers: int) -> int:
        """The `mtu`, by default that of an ethernet, or a longer one where the relay could not keep up with so many packets."""
        if self.mtu is not None:
            return self.mtu
        total = workers * (self.megabits or float("inf")) if self.relayed else 0.0
        return 1500 if total <= 250 else 9000 if total < 2000 else 60_000

    def counted_bytes(self, workers: int) -> int:
        """Most bytes that an interface counts as one packet; without a relay the kernel passes on several as one piece."""
        packet = self.packet_bytes(workers)
        if self.relayed:
            return packet
        return (
            _PIECE
            if self.megabits is None
            else max(min(round(_PIECE_SECONDS * self.megabits * 125_000), _PIECE), 2 * packet)
        )


@dataclass(frozen=True)
class Network:
    """Namespaces joined by a link, which `shaped_network` makes and removes."""

    namespaces: tuple[str, ...]
    """The namespace of each worker, by rank."""
    addresses: tuple[str, ...]
    """The address of each worker, by rank. Networks are isolated, so all use the same addresses."""
    interface: str
    """The name of the interface in every namespace, as gloo takes it in GLOO_SOCKET_IFNAME."""
    hub: str
    """The namespace of the bridge."""
    relay: "subprocess.Popen[str] | None" = None
    """The process that carries the packets where there is no bridge."""

    def command(self, rank: int) -> list[str]:
        """The prefix of a command that is to run in the namespace of a worker."""
        return ["ip", "netns", "exec", self.namespaces[rank]]

    def environment(self, rank: int) -> dict[str, str]:
        """Environment variables from which torch.distributed makes one gloo group of all workers."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(self.namespaces)),
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": self.interface,
        }

    def freeze(self) -> None:
        """Stop all packets until `thaw`: a relay keeps about a thousand of each worker, others are lost."""
        self._switch(signal.SIGSTOP, "down")

    def thaw(self) -> None:
        """End a `freeze`."""
        self._switch(signal.SIGCONT, "up")

    def _switch(self, command: signal.Signals, state: str) -> None:
        if self.relay is None:
            ip("-n", self.hub, "link", "set", "hub", state)
        elif self.relay.poll() is None:
            self.relay.send_signal(command)
        else:
            raise RuntimeError(f"the relay of this network has ended ({self.relay.returncode}): make another network")

    def change(self, link: Link) -> None:
        """Change bandwidth, delay and loss while the network is in use; in a frozen one, from `thaw` on.

        Raises ValueError for a delay or loss where there was none: the kernel's bridge has neither.
        """
        if self.relay is not None:
            _send_shape(self.relay, link)
        elif link.relayed:
            raise ValueError(
                f"{link} on a network that was made without delay or loss: make it with some, however little, and change that"
            )
        else:
            _limit(self, link)

    def bytes_sent(self, rank: int) -> int:
        """Bytes that a worker has sent so far, with headers, as the kernel counts them at the interface."""
        return self._count(rank, "tx")

    def bytes_received(self, rank: int) -> int:
        """Bytes that a worker has received so far, with headers, as the kernel counts them at the interface."""
        return self._count(rank, "rx")

    def _count(self, rank: int, direction: str) -> int:
        found = ip("-n", self.namespaces[rank], "-s", "-j", "link", "show", "dev", self.interface)
        return json.loads(found)[0]["stats64"][direction]["bytes"]


@contextmanager
def shaped_network(workers: int = 2, *, link: Link | None = None) -> Iterator[Network]:
    """Make a namespace for every worker, joined by links; at the end kill the processes in them and remove all.

    Args:
        workers: how many. Two have one line between them; more have one each to the middle of a star.
        link: bandwidth, delay and loss; None for no limits.

    Raises RuntimeError where networks cannot be made (see `available`), ValueError for too few or too many workers.
    """
    if not 2 <= workers <= 200:
        raise ValueError(f"workers={workers}: a network has from 2 to 200")
    if reason := available():
        raise RuntimeError(f"no network can be made here: {reason}")
    link = link or Link()
    base = f"{PREFIX}{os.getpid()}-{next(_serial)}"
    namespaces = tuple(f"{base}-{rank}" for rank in range(workers))
    network = Network(namespaces, tuple(f"10.77.0.{1 + rank}" for rank in range(workers)), _INTERFACE, f"{base}-hub")
    with ExitStack() as stack:
        stack.callback(remove, [*namespaces, network.hub])
        for namespace in namespaces:
            ip("netns", "add", namespace)
        if link.relayed:
            network = replace(network, relay=_start_relay(network, link, stack))
        else:
            _build_bridge(network, link)
            _limit(network, link)
        for rank in range(workers):
            _set_up(network, rank, link)
        _await_carrier(network)
        yield network


def _build_bridge(network: Network, link: Link) -> None:
    """Join the namespaces in the kernel: a pair of interfaces from each to a bridge."""
    ip("netns", "add", network.hub)
    mtu = link.packet_bytes(len(network.namespaces))
    lines = ["link add hub type bridge stp_state 0", f"link set hub mtu {mtu} up"]
    for rank, namespace in enumerate(network.namespaces):
        lines.append(f"link add port{rank} type veth peer name {network.interface} netns {namespace}")
        lines.append(f"link set port{rank} master hub mtu {mtu} up")
    ip("-n", network.hub, "-batch", "-", lines=lines)


def _limit(network: Network, link: Link) -> None:
    """Limit the bandwidth of each worker's up-link, at its own end, and of its down-link, at the hub's."""
    workers = len(network.namespaces)
    second, piece = (link.megabits or 0.0) * 125_000, link.counted_bytes(workers)
    queue = round(link.queue_seconds * second) + 2 * piece
    own = max(queue, _OWN_QUEUE * link.packet_bytes(workers))  # so that TCP waits there, as with a network card
    ends = [(namespace, network.interface, own) for namespace in network.namespaces]
    ends += [(network.hub, f"port{rank}", queue) for rank in range(workers)]
    for namespace, interface, limit in ends:
        ip("-n", namespace, "link", "set", interface, "gso_max_size", f"{piece if second else _PIECE}")
        if second:
            shape = ["rate", f"{round(8 * second)}bit", "burst", f"{2 * piece}b", "limit", f"{limit}b"]
            tc("-n", namespace, "qdisc", "replace", "dev", interface, "root", "tbf", *shape)
        elif "tbf" in tc("-n", namespace, "qdisc", "show", "dev", interface):
            tc("-n", namespace, "qdisc", "del", "dev", interface, "root")


def _start_relay(network: Network, link: Link, stack: ExitStack) -> "subprocess.Popen[str]":
    """Join the namespaces by a relay process, which the stack ends."""
    for namespace in network.namespaces:
        ip("-n", namespace, "tuntap", "add", "mode", "tun", "name", network.interface)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "noctule.testing.relay", network.interface]
    command += [f"{namespace}={address}" for namespace, address in zip(network.namespaces, network.addresses)]
    relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    stack.callback(relay.communicate)
    stack.callback(relay.kill)  # it has nothing to finish, and may be suspended
    _send_shape(relay, link)
    if relay.stdout is None or relay.stdout.readline() != "ready\n":
        raise RuntimeError(f"the relay ended with {relay.wait()} before it was ready; see its stderr")
    return relay


def _set_up(network: Network, rank: int, link: Link) -> None:
    """Give a worker's interface its address; without IPv6, whose announcements would be counted as sent."""
    name = network.interface
    lines = [
        f"link set {name} addrgenmode none mtu {link.packet_bytes(len(network.namespaces))} txqueuelen {_OWN_QUEUE}",
        f"addr add {network.addresses[rank]}/24 dev {name}",
        "link set lo up",
        f"link set {name} up",
    ]
    ip("-n", network.namespaces[rank], "-batch", "-", lines=lines)


def _await_carrier(network: Network) -> None:
    """Wait until the kernel reports all interfaces as connected: before that it drops packets."""
    for namespace in network.namespaces if network.relay else [*network.namespaces, network.hub]:
        while any(
            found["operstate"] not in ("UP", "UNKNOWN") and found["ifname"] != "lo"
            for found in json.loads(ip("-n", namespace, "-j", "link", "show"))
        ):
            time.sleep(0.005)


def _send_shape(relay: "subprocess.Popen[str]", link: Link) -> None:
    """Send the relay a line with the rates, delays and losses from now on."""
    shape = {
        "bytes_per_second": link.megabits and link.megabits * 125_000,
        "delay_seconds": link.delay_ms / 1000,
        "loss": link.loss,
        "queue_seconds": link.queue_seconds,
        "seed": link.seed,
    }
    assert relay.stdin is not None
    relay.stdin.write(json.dumps(shape) + "\n")
    relay.stdin.flush()


def main() -> None:
    """Run a command once for each worker, over a link."""
    parser = argparse.ArgumentParser(prog="python -m noctule.testing.link", description=main.__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabits", type=float)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("command", nargs="+", help="gets RANK, WORLD_SIZE, MASTER_ADDR and so on, as from torchrun")
    options = parser.parse_args()
    link = Link(megabits=options.megabits, delay_ms=options.delay_ms, loss=options.loss)
    with shaped_network(options.workers, link=link) as network:
        running = [
            subprocess.Popen(
                [*network.command(rank), *options.command], env={**os.environ, **network.environment(rank)}
            )
            for rank in range(options.workers)
        ]
        codes = [process.wait() for process in running]
    sys.exit(max(codes, key=abs))


if __name__ == "__main__":
    main()
