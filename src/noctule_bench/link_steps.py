"""What `link` times in its workers: a step of data-parallel training, with its gradients sent in one way or another."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from noctule.codecs import Cast, NaturalCompression, TopK
from noctule.core.exchange import Channel, Exchange
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
    "top 1 %": lambda: Channel(Compress(TopK(0.01)), path=AllGather(own_group())),
    "top 1.56 %, natural": lambda: Channel(
        Compress(TopK(0.0156, values=NaturalCompression())), path=AllGather(own_group())
    ),
    "PowerSGD 4": lambda: PowerSGD(4, inner=Channel(path=AllReduce(own_group()))),
    "PowerSGD 4, bfloat16": lambda: PowerSGD(
        4, inner=Channel(Compress(Cast(torch.bfloat16), error_feedback=False), path=AllGather(own_group()))
    ),
}
ROWS: dict[str, Callable[[], Exchange] | None] = {
    "ddp fp32": None,
    "ddp fp32, torch's hook": None,
    "ddp fp16": None,
    **EXCHANGES,
    "natural, all-gather": lambda: Channel(Compress(NaturalCompression()), path=AllGather(own_group())),
    "auto": lambda: Auto({name: make() for name, make in EXCHANGES.items()}, probe=_probe),
}
"""Plain DDP, torch's own hooks, and Noctule's exchanges."""
TORCHS = {"ddp fp32, torch's hook": allreduce_hook, "ddp fp16": fp16_compress_hook}
"""The first does what DDP does without one: what is over is the price of any hook."""


@dataclass
class _Row:
    step: Callable[[], Tensor]
    exchange: Exchange | None
    parameters: dict[str, nn.Parameter]


_rows: dict[str, _Row] = {}


def _probe() -> LinkEstimate:
    return probe_link(Group(own_group()))


def why(rank: int, world: int) -> str:
    """What the automatic choice says."""
    exchange = _rows["auto"].exchange
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
    elif row in TORCHS:
        wrapped.register_comm_hook(None, TORCHS[row])
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9, fused=True)
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(batch, width, generator=generator), torch.randint(10, (batch,), generator=generator)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(wrapped(x), y)
        loss.backward()
        optimizer.step()
        return loss

    _rows[row] = _Row(step, exchange, dict(model.named_parameters()))
    return sum(p.nbytes for p in model.parameters())


def warm(rank: int, world: int, row: str) -> float:
    """Seconds of a step, after the first ones: DDP cuts its buckets anew, and the automatic choice tries its candidates."""
    found = _rows[row]
    found.step()
    while isinstance(found.exchange, Auto) and not found.exchange.settled:
        found.step()
    return timed(rank, world, row, 1)["seconds"]


def price(rank: int, world: int, row: str) -> dict[str, float]:
    """What one exchange of the row should send, and in how many messages."""
    found = _rows[row]
    if found.exchange is None:
        return {"bytes": 0.0, "messages": 0}
    with torch.no_grad():
        cost = found.exchange.rehearse(list(found.parameters.values()), list(found.parameters))
    about = cost.sent_bytes / (2 * (world - 1))  # of a message
    return {"bytes": cost.sent_bytes, "messages": cost.rounds * (world - 1) / Group().rounds(about)}


def step(rank: int, world: int, row: str) -> None:
    """One that is not timed: TCP begins anew to find out how fast a line is after others have used it."""
    _rows[row].step()


def timed(rank: int, world: int, row: str, steps: int) -> dict[str, Any]:
    """Seconds of so many steps, begun together, and the bytes that the exchange says it sent."""
    found = _rows[row]
    before = sent_bytes(found.exchange)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        found.step()
    seconds = time.perf_counter() - started
    return {"seconds": seconds / steps, "bytes": (sent_bytes(found.exchange) - before) / steps}


def forget(rank: int, world: int) -> None:
    """Drop all models, before the next link."""
    _rows.clear()


def sent_bytes(exchange: Exchange | None) -> int:
    """Of everything below an exchange."""
    if exchange is None:
        return 0
    if isinstance(exchange, Auto):
        return sum(sent_bytes(each) for each in exchange.candidates.values())
    if isinstance(exchange, PowerSGD):
        return sent_bytes(exchange.inner)
    return exchange.path.group.sent_bytes  # type: ignore[attr-defined]
