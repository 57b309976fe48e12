"""The program that carries packets between network namespaces, each worker on lines of given bandwidth, delay and loss.

    python -m noctule.testing.relay INTERFACE NAMESPACE=ADDRESS NAMESPACE=ADDRESS ...

`noctule.testing.link` starts it. Each line of its input is the shape of the lines from then on, as JSON; the end of the input ends
it, so that it does not outlive who started it. SIGSTOP freezes all lines.
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
"""Packets read from one line before the others have their turn."""
IN_FLIGHT = 1 << 16
"""Packets held in all; what comes beyond is dropped."""
REST_SECONDS = 1e-4
"""Packets that leave within so short a time leave together: a wake-up each would cost more CPU than the work."""

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def open_device(namespace: str, name: str) -> int:
    """Move this process into a namespace, and take the other end of a TUN device that is there."""
    enter(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def read_shape() -> dict[str, Any] | None:
    """The last of the lines that have come to the input, or None at its end; lines this short come whole."""
    lines = os.read(0, 65536).splitlines()
    return json.loads(lines[-1]) if lines else None


def carry(devices: dict[bytes, int], shape: dict[str, Any]) -> None:
    """Pass packets on by their destination until the input ends.

    A packet waits for its sender's up-link, then for its receiver's down-link, which are clocks: each is busy until some time,
    and a packet moves that on by its length. It begins to go down as it begins to go up, so that two workers share what is
    one line. A line that is busy for longer than its queue is drops what comes.

    Args:
        devices: the TUN device of each address (4 bytes).
        shape: `bytes_per_second` (or None), `delay_seconds` one way, `loss` (a probability), `queue_seconds`, `seed`.
    """
    lines = list(devices.values())
    up, down = dict.fromkeys(lines, 0.0), dict.fromkeys(lines, 0.0)
    flying: list[tuple[float, int, bytes, int, bool]] = []  # when, order, packet, to, whether it has then arrived
    order = itertools.count()
    random.seed(shape["seed"])
    while True:
        rate, delay = shape["bytes_per_second"] or math.inf, shape["delay_seconds"]
        loss, queue = shape["loss"], shape["queue_seconds"]
        now = monotonic()
        while flying and flying[0][0] <= now:
            when, _, packet, to, arrived = heapq.heappop(flying)
            if arrived:
                with suppress(OSError):  # the receiver's own queue is full, or its interface is down: lost
                    os.write(to, packet)
            elif (begin := max(when, down[to])) - when <= queue:
                down[to] = end = begin + len(packet) / rate
                heapq.heappush(flying, (end + delay, next(order), packet, to, True))
        rest = max(flying[0][0] - monotonic(), REST_SECONDS) if flying else None
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
                if to is not None and begin - now <= queue and len(flying) < IN_FLIGHT:
                    up[line] = begin + len(packet) / rate
                    if not lost:  # on the way: it took its time on the line all the same
                        heapq.heappush(flying, (begin, next(order), packet, to, False))


def main() -> None:
    """Take the devices in the namespaces, say that all is ready, and carry."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal: whoever started this ends it
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
