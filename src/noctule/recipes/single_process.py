"""The baseline of several workers on one machine: one process with all of their threads."""

import copy
import inspect
from itertools import chain, count
from statistics import median
from time import perf_counter

import torch
from torch import nn
from torch.optim import Optimizer

from noctule.data import Batches
from noctule.report.units import GAP, duration
from noctule.train.fit import Loss

SECONDS, MOST_STEPS = 1.0, 30
"""Limits of a measurement: its time, about, and its number of steps."""


def single_process_seconds(
    model: nn.Module, optimizer: Optimizer, train: Batches, loss_fn: Loss, *, workers: int
) -> float:
    """Estimate the seconds of an epoch in one process with the threads of all workers, from some steps of a copy.

    Args:
        model: the trained network; the copy computes in the same way.
        optimizer: the copy has another of this kind, with the same defaults.
        train: whole batches.
        loss_fn: of outputs and targets.
        workers: how many there are, each with as many threads as this one.
    """
    threads = torch.get_num_threads()
    twin = copy.deepcopy(model)
    accepted = inspect.signature(type(optimizer)).parameters
    own = type(optimizer)(twin.parameters(), **{k: v for k, v in optimizer.defaults.items() if k in accepted})
    batches = chain.from_iterable(train.epoch(epoch) for epoch in count())
    seconds: list[float] = []
    twin.train()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(threads * workers)
            while len(seconds) < 3 or (len(seconds) < MOST_STEPS and sum(seconds) < SECONDS):
                started = perf_counter()
                inputs, targets = next(batches)
                own.zero_grad(set_to_none=True)
                loss_fn(twin(inputs), targets).backward()
                own.step()
                seconds.append(perf_counter() - started)
        finally:
            torch.set_num_threads(threads)
    return median(seconds[1:]) * len(train)


def slowdown(workers: int, seconds: float, alone: float, *, threads: int) -> str | None:
    """A message if the workers are slower than one process, else None.

    >>> slowdown(2, 3.0, 1.5, threads=2)
    '2 workers took 3.00 s an epoch; one process with 2 threads takes about 1.50 s here: without --workers it is faster'
    """
    if seconds <= alone:
        return None
    with_threads = f"{threads} thread{'' if threads == 1 else 's'}"
    return (
        f"{workers} workers took {duration(seconds)} an epoch; one process with {with_threads} takes about "
        f"{duration(alone)} here: without --workers it is faster"
    ).replace(GAP, " ")
