"""Measure latency and bandwidth of the link between the workers."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from noctule.exchange.group import Group


@dataclass(frozen=True)
class LinkEstimate:
    """The latency and bandwidth between the workers, at the slowest of them."""

    latency_seconds: float
    """The time of one message to another worker, however small."""
    bytes_per_second: float
    """The rate at which a worker can send while all do."""

    def seconds(self, sent_bytes: float, rounds: int) -> float:
        """The time to send so many bytes in so many rounds, one after the other."""
        return rounds * self.latency_seconds + sent_bytes / self.bytes_per_second

    def __str__(self) -> str:
        """The bandwidth in Mbit/s and the latency in ms."""
        return f"{self.bytes_per_second * 8e-6:.3g} Mbit/s, {self.latency_seconds * 1e3:.3g} ms"


def probe_link(group: Group, *, repeats: int = 5, seconds: float = 0.2, most_bytes: int = 1 << 22) -> LinkEstimate:
    """Measure the link by a few all-gathers, of which the median counts; all workers get the same estimate.

    Args:
        group: the workers.
        repeats: the number of messages of each size.
        seconds: about how long the largest messages may take, of ``most_bytes`` at most.
    """
    if group.world == 1:
        return LinkEstimate(0.0, float("inf"))
    size = 1 << 12
    (small,) = agreed(group.share, [_gather_seconds(group, 1, repeats)])
    taken = small
    while size < most_bytes and taken - small < seconds / 4:
        size *= 4
        (taken,) = agreed(group.share, [_gather_seconds(group, size, 1)])
    (taken,) = agreed(group.share, [_gather_seconds(group, size, repeats)])
    return LinkEstimate(small / group.rounds(1), (group.world - 1) * size / max(taken - small, 1e-9))


def agreed(share: Callable[[bytes], list[bytes]], numbers: Sequence[float]) -> list[float]:
    """The largest of each number over all workers."""
    everyones = [json.loads(message) for message in share(json.dumps(list(numbers)).encode())]
    return [max(several) for several in zip(*everyones, strict=True)]


def _gather_seconds(group: Group, size: int, repeats: int) -> float:
    """The seconds until every worker has a message of this size from every other."""
    wire, taken = torch.zeros(size, dtype=torch.uint8), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        group.all_gather(wire, fixed=True)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])  # the first waits for the slowest worker to begin
