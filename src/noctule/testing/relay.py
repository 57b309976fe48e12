"""A program that carries packets between network namespaces over lines of given bandwidth, delay and loss.

    python -m noctule.testing.relay INTERFACE NAMESPACE=ADDRESS NAMESPACE=ADDRESS ...

`noctule.testing.link` starts it. Each line of its input is the shape of the lines from then on, as JSON; the end of the input ends
it, so that it does not outlive its parent. SIGSTOP freezes all lines.
"""

import fcntl
import heapq
import itertools
import json
import math
import os
import random
import select
import signal
import struct
import sys
from contextlib import suppress
from time import monotonic
from typing import Any

from noctule.testing.namespaces import enter

BURST = 64
"""Packets read from one line before the next line is read."""
IN_FLIGHT = 1 << 16
"""Packets held in all; further ones are dropped."""
REST_SECONDS = 1e-4
"""Shortest sleep: packets due within it leave together, since a wake-up for each would cost more CPU than the work."""

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def open_device(namespace: str, name: str) -> int:
    """Move this process into a namespace and open the other end of a TUN device in it."""
    enter(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def read_shape() -> dict[str, Any] | None:
    """The last line of the input so far, or None at its end; lines this short arrive whole."""
    lines = os.read(0, 65536).splitlines()
    return json.loads(lines[-1]) if lines else None


def carry(devices: dict[bytes, int], shape: dict[str, Any]) -> None:
    """Forward packets by their destination until the input ends.

    A packet waits for its sender's up-link, then for its receiver's down-link. Each is a clock, the time until which the link is
    busy, and a packet advances it by its length. A packet begins to go down as it begins to go up, so that two workers share what
    is one line. A line that is busy for longer than its queue drops packets.

    Args:
        devices: the TUN device of each address (4 bytes).
        shape: `bytes_per_second` (or None), `delay_seconds` one way, `loss` (a probability), `queue_seconds`, `seed`.
    """
    lines = list(devices.values())
    up, down = dict.fromkeys(lines, 0.0), dict.fromkeys(lines, 0.0)
    in_flight: list[tuple[float, int, bytes, int, bool]] = []  # when, order, packet, to, whether it has then arrived
    order = itertools.count()
    random.seed(shape["seed"])
    while True:
        rate, delay = shape["bytes_per_second"] or math.inf, shape["delay_seconds"]
        loss, queue = shape["loss"], shape["queue_seconds"]
        now = monotonic()
        while in_flight and in_flight[0][0] <= now:
            when, _, packet, to, arrived = heapq.heappop(in_flight)
            if arrived:
                with suppress(OSError):  # the receiver's own queue is full, or its interface is down: lost
                    os.write(to, packet)
            elif (begin := max(when, down[to])) - when <= queue:
                down[to] = end = begin + len(packet) / rate
                heapq.heappush(in_flight, (end + delay, next(order), packet, to, True))
        rest = max(in_flight[0][0] - monotonic(), REST_SECONDS) if in_flight else None
        # Not epoll, which rounds what it waits to whole milliseconds.
        for line in select.select([0, *lines], [], [], rest)[0]:
            if line == 0:
                if (changed := read_shape()) is None:
                    return
                shape = changed
                continue
            for _ in range(BURST):
                try:
                    packet = os.read(line, 65536)
                except BlockingIOError:
                    break
                now = monotonic()
                begin = max(now, up[line])
                to = devices.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                lost = loss and random.random() < loss
                if to is not None and begin - now <= queue and len(in_flight) < IN_FLIGHT:
                    up[line] = begin + len(packet) / rate
                    if not lost:  # a lost packet occupies the line as well
                        heapq.heappush(in_flight, (begin, next(order), packet, to, False))


def main() -> None:
    """Open the devices in the namespaces, print "ready", and forward packets."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal: the parent ends this process
    with suppress(OSError):
        os.nice(-10)  # a line does not wait for the workers' CPU
    interface, *places = sys.argv[1:]
    devices = {}
    for namespace, address in (place.split("=") for place in places):
        devices[bytes(map(int, address.split(".")))] = open_device(namespace, interface)
    shape = read_shape()
    print("ready", flush=True)
    if shape:
        carry(devices, shape)


if __name__ == "__main__":
    main()
