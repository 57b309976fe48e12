"""What the workers of these tests are asked to do."""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor


def mean(rank: int, workers: int, x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x / workers


def who(rank: int, workers: int) -> dict[str, int]:
    group = dist.get_rank() if dist.is_initialized() else -1
    return {
        "rank": rank,
        "workers": workers,
        "group": group,
        "process": os.getpid(),
        "threads": torch.get_num_threads(),
    }


def echo(rank: int, workers: int, *arguments: object) -> list[object]:
    return list(arguments)


def fail_on(rank: int, workers: int, failing: int) -> int:
    """One rank fails, the others wait for it."""
    if rank == failing:
        raise KeyError(f"no luck on {rank}")
    dist.barrier()
    return rank


def fail_alone(rank: int, workers: int, failing: int) -> int:
    """One rank fails, the others are done without it."""
    if rank == failing:
        raise KeyError(f"no luck on {rank}")
    return rank


def exit_on(rank: int, workers: int, ending: int) -> None:
    if rank == ending:
        print("these are its last words", file=sys.stderr, flush=True)
        os._exit(3)
    dist.barrier()


def sleep_on(rank: int, workers: int, sleeping: int, seconds: float) -> int:
    if rank == sleeping:
        time.sleep(seconds)
    return rank


def reduce_on_and_on(rank: int, workers: int, seconds: float) -> int:
    """Reduce until the time is over."""
    x = torch.ones(10)
    end = time.monotonic() + seconds
    count = 0
    while x[0] > 0:
        x.fill_(float(time.monotonic() < end))
        dist.all_reduce(x)
        count += 1
    return count


def unsavable(rank: int, workers: int) -> object:
    return os.getpid


def square(rank: int, workers: int, x: Tensor) -> Tensor:
    return x @ x


def timed_reduce(rank: int, workers: int, numbers: int) -> float:
    x = torch.ones(numbers)
    dist.barrier()
    begin = time.monotonic()
    dist.all_reduce(x)
    assert x.eq(workers).all()
    return time.monotonic() - begin
