"""What `link` times in its workers: a step of data-parallel training, with its gradients sent in one way or another."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from noctule.channel import Channel, Exchange
from noctule.codecs import NaturalCompression, TopK
from noctule.exchange import (
    AllGather,
    AllReduce,
    Auto,
    Compress,
    Group,
    LinkEstimate,
    PowerSGD,
    TwoPhase,
    ddp_hook,
    own_group,
    probe_link,
)
from noctule.models import mlp

EXCHANGES: dict[str, Callable[[], Exchange]] = {
    "all-reduce": lambda: Channel(path=AllReduce(own_group())),
    "natural": lambda: Channel(Compress(NaturalCompression()), path=TwoPhase(own_group())),
    "natural, all-gather": lambda: Channel(Compress(NaturalCompression()), path=AllGather(own_group())),
    "top 1 %": lambda: Channel(Compress(TopK(0.01)), path=AllGather(own_group())),
    "top 1.56 %, natural": lambda: Channel(
        Compress(TopK(0.0156, values=NaturalCompression())), path=AllGather(own_group())
    ),
    "PowerSGD 4": lambda: PowerSGD(4, over=Channel(path=AllReduce(own_group()))),
}
ROWS: dict[str, Callable[[], Exchange] | None] = {
    "ddp fp32": None,
    "ddp fp16": None,
    **EXCHANGES,
    "auto": lambda: Auto({name: make() for name, make in EXCHANGES.items()}, probe=_probe),
}
"""Plain DDP, torch's own hook, and Noctule's exchanges."""

_steps: dict[str, tuple[Callable[[], Tensor], Exchange | None]] = {}


def _probe() -> LinkEstimate:
    return probe_link(Group(own_group()))


def why(rank: int, world: int) -> str:
    """What the automatic choice says."""
    _, exchange = _steps["auto"]
    return exchange.why() if isinstance(exchange, Auto) else ""


def prepare(rank: int, world: int, row: str, megabytes: float, batch: int) -> int:
    """Make a model of about this size, and its step; the bytes of its weights."""
    torch.manual_seed(0)
    width = round((megabytes * 1e6 / 4 / 2) ** 0.5)
    model = mlp(width, width, width, 10)
    wrapped = DistributedDataParallel(model)
    make = ROWS[row]
    exchange = make() if make else None
    if exchange:
        wrapped.register_comm_hook(None, ddp_hook(exchange, wrapped))
    elif row == "ddp fp16":
        wrapped.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9, fused=True)
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(batch, width, generator=generator), torch.randint(10, (batch,), generator=generator)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(wrapped(x), y)
        loss.backward()
        optimizer.step()
        return loss

    _steps[row] = (step, exchange)
    return sum(p.nbytes for p in model.parameters())


def timed(rank: int, world: int, row: str, steps: int) -> dict[str, Any]:
    """Seconds of so many steps, begun together, and the bytes that the exchange says it sent."""
    step, exchange = _steps[row]
    before = sent_bytes(exchange)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = time.perf_counter() - started
    return {"seconds": seconds / steps, "bytes": (sent_bytes(exchange) - before) / steps}


def forget(rank: int, world: int) -> None:
    """Drop all models, before the next link."""
    _steps.clear()


def sent_bytes(exchange: Exchange | None) -> int:
    """Of everything below an exchange."""
    if exchange is None:
        return 0
    if isinstance(exchange, Auto):
        return sum(sent_bytes(each) for each in exchange.candidates.values())
    if isinstance(exchange, PowerSGD):
        return sent_bytes(exchange.over)
    return exchange.path.group.sent_bytes  # type: ignore[attr-defined]
