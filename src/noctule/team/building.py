"""What a strategy of the command line is made of: its method, its exchange, its codec, the optimizer of its server."""

from functools import partial

import torch

from noctule.codecs import Cast, Codec, NaturalCompression, TopK
from noctule.core.exchange import Channel, Exchange
from noctule.core.method import Method
from noctule.exchange import (
    AllGather,
    AllReduce,
    Auto,
    Compress,
    EverySync,
    Group,
    PowerSGD,
    TwoPhase,
    Weigh,
    probe_link,
)
from noctule.parallel import DiLoCo
from noctule.parallel.diloco import AVERAGE
from noctule.team.strategy import Coding, Strategy

TOP, LEAST = 0.0156, 256
"""Of the numbers that `topk` sends, each as one byte of natural compression, and how many of each tensor at least."""
RANK = 4
"""Of `powersgd`."""


def method(strategy: Strategy, exchange: Exchange) -> Method:
    """What workers in a process group attach."""
    if strategy.strategy == "sync":
        return EverySync(exchange)
    momentum = strategy.outer_momentum
    nesterov = partial(torch.optim.SGD, lr=strategy.outer_rate, momentum=momentum, nesterov=momentum > 0.0)
    return DiLoCo(exchange, every=strategy.meet_every, outer=nesterov if strategy.strategy == "diloco" else AVERAGE)


def exchange(strategy: Strategy, weigh: Weigh) -> Exchange:
    """Between the members of the process group as it is; ``weigh`` says what a worker's gradients count."""
    if strategy.codec == "auto":
        candidates: tuple[Coding, ...] = ("none", "bf16", "natural", "topk", "powersgd")
        coded = {name: _coded(strategy, name, weigh) for name in candidates}
        return Auto(coded, probe=lambda: probe_link(Group()))
    return _coded(strategy, strategy.codec, weigh)


def server_optimizer(strategy: Strategy, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """What moves the weights at the server."""
    if strategy.strategy == "wasap":
        return torch.optim.SGD(parameters, lr=strategy.server_rate, momentum=0.9)
    return torch.optim.Adagrad(parameters, lr=strategy.server_rate)


def _coded(strategy: Strategy, name: Coding, weigh: Weigh) -> Exchange:
    counted = [weigh] if strategy.equal_weights else []  # the others exchange weights, of which each counts as much
    coding = codec(name)
    if name == "powersgd":
        return PowerSGD(RANK, inner=Channel(*counted, path=AllReduce()))
    if coding is None:
        return Channel(*counted, path=AllReduce())
    return Channel(*counted, Compress(coding), path=AllGather() if name == "topk" else TwoPhase())


def codec(name: Coding) -> Codec | None:
    """The codec of single tensors that a name means, if it means one."""
    match name:
        case "bf16":
            return Cast(torch.bfloat16)
        case "natural":
            return NaturalCompression()
        case "topk":
            return TopK(TOP, at_least=LEAST, values=NaturalCompression())
        case _:
            return None
