"""What several workers of one machine have to be faster than: one process with all of their threads."""

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

SECONDS, MOST = 1.0, 30
"""That measuring may take, about, and steps that it takes at most."""


def alone_seconds(model: nn.Module, optimizer: Optimizer, train: Batches, loss_fn: Loss, *, workers: int) -> float:
    """Seconds that an epoch would take one process with the threads of all workers, from some steps of a copy.

    Args:
        model: in the way in which it was trained.
        optimizer: of its kind, and with its defaults, the copy has one of its own.
        train: whole batches.
        loss_fn: of outputs and targets.
        workers: of which each has as many threads as this one.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    twin = copy.deepcopy(model)
    accepted = inspect.signature(type(optimizer)).parameters
    own = type(optimizer)(twin.parameters(), **{k: v for k, v in optimizer.defaults.items() if k in accepted})
    batches = chain.from_iterable(train.epoch(epoch) for epoch in count())
    seconds: list[float] = []
    twin.train()
    try:
        torch.set_num_threads(threads * workers)
        while len(seconds) < 3 or (len(seconds) < MOST and sum(seconds) < SECONDS):
            started = perf_counter()
            inputs, targets = next(batches)
            own.zero_grad(set_to_none=True)
            loss_fn(twin(inputs), targets).backward()
            own.step()
            seconds.append(perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    return median(seconds[1:]) * len(train)


def compared(workers: int, seconds: float, alone: float, *, threads: int) -> str | None:
    """What to say where the workers are slower than one process; nothing where they are not.

    >>> compared(2, 3.0, 1.5, threads=2)
    '2 workers took 3.00 s an epoch; one process with 2 threads takes about 1.50 s here: without --workers it is faster'
    """
    if seconds <= alone:
        return None
    with_threads = f"{threads} thread{'' if threads == 1 else 's'}"
    return (
        f"{workers} workers took {duration(seconds)} an epoch; one process with {with_threads} takes about "
        f"{duration(alone)} here: without --workers it is faster"
    ).replace(GAP, " ")
