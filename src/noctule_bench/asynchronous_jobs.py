"""What the workers of `noctule bench asynchronous` do; each function is given its rank and their number."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from noctule.codecs import Cast
from noctule.core.convert import convert_
from noctule.core.exchange import Channel
from noctule.core.method import Method, attach
from noctule.data import Batches, Splits, load
from noctule.exchange import AllGather
from noctule.models import mlp
from noctule.parallel import PushPull, Sandblaster, wasap
from noctule.sparse.layers import AllReLU, FuseEpilogue, ToSparse
from noctule.sparse.rewire import set_
from noctule.train.fit import evaluate
from noctule.transport.ticket import Ticket

BATCH, DENSITY, FRACTION = 128, 0.05, 0.3
HIDDEN = (1000, 1000)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=2e-4)
"""Of one worker, and of the server."""
L2, PORTIONS = 1e-4, 48
"""Of Sandblaster: the penalty on squared weights, and in how many portions its batch is cut."""


def network(features: int, classes: int, seed: int) -> nn.Module:
    """The truly sparse MLP, made alike everywhere."""
    torch.manual_seed(seed)
    dense = mlp(features, *HIDDEN, classes, activation=lambda layer: AllReLU(0.6, layer=layer))
    return convert_(convert_(dense, ToSparse(density=DENSITY)).model, FuseEpilogue()).model


def trained(rank: int, world: int, plan: dict[str, Any]) -> dict[str, Any]:
    """One on everything, or several on their shares of the data; the outcome and the pace of this worker."""
    splits = _data(plan)
    _first_step(splits)
    model = network(splits.train.features, splits.train.classes, plan["seed"])
    optimizer = SGD(model.parameters())
    share = splits.train.take(torch.arange(rank, len(splits.train), world))
    batches = Batches(share, BATCH, seed=plan["seed"] * world + rank)
    steps, every = plan["epochs"] * len(batches), len(batches)
    moving = partial(set_, every=every, fraction=FRACTION)
    methods: list[Method] = [moving(seed=plan["seed"])]
    pushing = None
    if world > 1 and plan["method"] != "apart":
        ticket, apart = Ticket.load(Path(plan["tickets"], str(rank))), plan["apart"]
        coding = Cast(torch.bfloat16) if plan["bf16"] else None
        overlap = plan["overlap"] and plan["bound"] is None
        pushing = PushPull(
            ticket, bound=plan["bound"], push_every=apart, pull_every=apart, overlap=overlap, codec=coding
        )
        if plan["method"] == "wasap":
            exchange = Channel(path=AllGather())
            methods = [wasap(pushing, exchange, steps=steps, rewire=moving, seed=plan["seed"])]
        else:  # connections stay where they are on all but worker 0, which moves them for all
            methods = [*(methods if rank == 0 else []), pushing]
    with attach(model, optimizer, *methods) as session:
        if world > 1:
            dist.barrier()
        started = time.perf_counter()
        for epoch in range(plan["epochs"]):
            for inputs, targets in batches.epoch(epoch):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
        session.settle()
        seconds = time.perf_counter() - started
        if world > 1:
            dist.barrier()
            if pushing is not None and plan["method"] != "wasap":
                pushing.now()  # what all have pushed by now
    stale = {} if pushing is None else {str(by): count for by, count in sorted(pushing.staleness.items())}
    samples = plan["epochs"] * len(share)
    return {
        "accuracy": evaluate(model, splits.test)[1],
        "seconds": seconds,
        "samples": samples,
        "samples_per_second": samples / seconds,
        "staleness": stale,
    }


def minimised(rank: int, world: int, plan: dict[str, Any]) -> dict[str, Any]:
    """L-BFGS on the whole training set in portions, by Sandblaster or, alone, by torch."""
    splits = _data(plan)
    _first_step(splits)
    inputs, targets = splits.train.inputs, splits.train.targets
    torch.manual_seed(plan["seed"])
    model = mlp(splits.train.features, 64, splits.train.classes)
    cuts = list(zip(inputs.tensor_split(PORTIONS), targets.tensor_split(PORTIONS), strict=True))

    def portion(number: int) -> torch.Tensor:
        x, y = cuts[number]
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / len(targets)
        loss = loss + L2 / 2 / PORTIONS * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    started = time.perf_counter()
    if world == 1:
        alone = torch.optim.LBFGS(
            model.parameters(), max_iter=plan["iterations"], line_search_fn="strong_wolfe", history_size=10
        )

        def whole() -> torch.Tensor:
            alone.zero_grad()
            return sum((portion(n).detach() for n in range(PORTIONS)), torch.zeros(()))

        for _ in range(plan["steps"]):
            alone.step(whole)  # type: ignore[arg-type] torch says float and takes a tensor
    else:
        optimizer = Sandblaster(
            model.named_parameters(), Ticket.load(Path(plan["tickets"], str(rank))), portions=PORTIONS
        )
        for _ in range(plan["steps"]):
            optimizer.step(portion)  # type: ignore[arg-type] a closure of torch has no arguments, this one a portion
        optimizer.close()
    seconds = time.perf_counter() - started
    return {"accuracy": evaluate(model, splits.test)[1], "seconds": seconds}


def _first_step(splits: Splits) -> None:
    """Of a network that is thrown away: in a new process it has half a second of imports to do, which no pace is about."""
    model = network(splits.train.features, splits.train.classes, 0)
    optimizer = SGD(model.parameters())
    nn.functional.cross_entropy(model(splits.train.inputs[:BATCH]), splits.train.targets[:BATCH]).backward()
    optimizer.step()


def _data(plan: dict[str, Any]) -> Splits:
    return load(plan["data"], data_dir=plan["data_dir"] and Path(plan["data_dir"]), seed=plan["seed"])
