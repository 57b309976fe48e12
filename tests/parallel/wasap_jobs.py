"""Trainings of processes: a few steps of a small network, and a truly sparse one on Fashion-MNIST."""

import time
from functools import partial
from typing import Any

import torch
from moving_jobs import sparse, state_of
from push_pull_jobs import MOMENTUM, batch
from push_pull_jobs import train as few_steps
from torch import nn

from noctule import AllReLU, ToSparse, attach, convert_, gse, mlp, set_
from noctule.core.exchange import Channel
from noctule.data import Batches, load
from noctule.exchange import AllGather
from noctule.parallel import PushPull, Ticket
from noctule.parallel.wasap import wasap
from noctule.train.fit import evaluate

BATCH = 128
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=2e-4)


def train(
    rank: int, world: int, tickets: str, epochs: int, bound: int | None, seed: int, apart: int = 1
) -> dict[str, Any]:
    """What it reaches on the test part; each of several trains on its share, one alone on everything."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    splits = load("fashion-mnist", seed=0)
    network = mlp(784, 1000, 1000, 10, activation=lambda layer: AllReLU(0.6, layer=layer))
    model: nn.Module = convert_(network, ToSparse(density=0.05)).model
    optimizer = SGD(model.parameters())
    share = splits.train.take(torch.arange(rank, len(splits.train), world))
    batches = Batches(share, BATCH, seed=seed + rank)
    steps, every = epochs * len(batches), len(batches)
    methods: list[Any] = [set_(every=every, seed=seed)]
    if world > 1:
        push_pull = PushPull(
            Ticket.load(f"{tickets}/worker-{rank}.json"), bound=bound, push_every=apart, pull_every=apart
        )
        mover = partial(set_, every=every)
        methods = [wasap(push_pull, Channel(path=AllGather()), steps=steps, rewire=mover, seed=seed)]
    started = time.perf_counter()
    with attach(model, optimizer, *methods):
        for epoch in range(epochs):
            for inputs, targets in batches.epoch(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
    seconds = time.perf_counter() - started
    loss, accuracy = evaluate(model, splits.test)
    return {"accuracy": accuracy, "loss": loss, "seconds": seconds, "samples": steps * BATCH}


def small(rank: int, world: int, tickets: str, steps: int) -> list[Any]:
    """The numbers and the keys that a small network ends with; connections move by what each worker sees."""
    model = sparse(seed=rank)
    optimizer = MOMENTUM(model.parameters())
    push_pull = PushPull(Ticket.load(f"{tickets}/worker-{rank}.json"), bound=1)
    method = wasap(push_pull, Channel(path=AllGather()), steps=steps, rewire=partial(gse, every=2))
    with attach(model, optimizer, method):
        few_steps(model, optimizer, [batch(rank, n) for n in range(steps)])
    numbers, topologies = state_of(model, optimizer)
    return [numbers, [topology.keys() for topology in topologies]]
