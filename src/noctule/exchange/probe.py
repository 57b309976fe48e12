"""How fast is the link between the workers?"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from noctule.exchange.group import Group


@dataclass(frozen=True)
class LinkEstimate:
    """The slowest of what the workers see of the link between them."""

    latency_seconds: float
    """Of one message to another worker, however small."""
    bytes_per_second: float
    """That a worker can send while all do."""

    def seconds(self, sent_bytes: float, rounds: int) -> float:
        """What it takes to send so much in so many rounds, one after the other."""
        return rounds * self.latency_seconds + sent_bytes / self.bytes_per_second

    def __str__(self) -> str:
        """In Mbit/s and ms."""
        return f"{self.bytes_per_second * 8e-6:.3g} Mbit/s, {self.latency_seconds * 1e3:.3g} ms"


def probe_link(group: Group, *, repeats: int = 5, seconds: float = 0.2, most_bytes: int = 1 << 22) -> LinkEstimate:
    """Measure latency and bandwidth, both as the median of a few gatherings; all workers get the same estimate.

    Args:
        group: between which workers.
        repeats: messages of each size.
        seconds: about how long the largest messages may take, of ``most_bytes`` at most.
    """
    if group.world == 1:
        return LinkEstimate(0.0, float("inf"))
    size = 1 << 12
    (small,) = agreed(group.share, [_gathered(group, 1, repeats)])
    taken = small
    while size < most_bytes and taken - small < seconds / 4:
        size *= 4
        (taken,) = agreed(group.share, [_gathered(group, size, 1)])
    (taken,) = agreed(group.share, [_gathered(group, size, repeats)])
    return LinkEstimate(small / group.rounds(1), (group.world - 1) * size / max(taken - small, 1e-9))


def agreed(share: Callable[[bytes], list[bytes]], numbers: Sequence[float]) -> list[float]:
    """The largest of each number over all workers."""
    said = [json.loads(each) for each in share(json.dumps(list(numbers)).encode())]
    return [max(several) for several in zip(*said, strict=True)]


def _gathered(group: Group, size: int, repeats: int) -> float:
    """Seconds until everyone has a message of this size from everyone."""
    wire, taken = torch.zeros(size, dtype=torch.uint8), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        group.gather(wire, fixed=True)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])  # the first waits for whoever comes late
