"""What the workers of `test_between_processes` do; each function is given its rank and their number."""

import contextlib
import copy
import math
import os
import signal
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from exchange_cases import KEYS, Half, given
from noctule import SparseLinear, ToSparse, convert_, ctre, gse, rigl, set_
from noctule.codecs import Cast, NaturalCompression, Payload
from noctule.core.errors import ExchangeError, LostWorkerError
from noctule.core.exact import Exact
from noctule.core.exchange import Channel, Exchange, Wrapped
from noctule.core.method import attach
from noctule.exchange import (
    AllGather,
    AllReduce,
    Auto,
    Compress,
    EverySync,
    Group,
    LinkEstimate,
    NoiseScale,
    PowerSGD,
    TwoPhase,
    Weigh,
    ddp_hook,
    fsdp_hooks,
    own_group,
    probe_link,
)

PATHS = {path.__name__: path for path in (AllGather, AllReduce, TwoPhase)}
CODECS = {"half": Half(), "bfloat16": Cast(torch.bfloat16), "natural": NaturalCompression()}


def averaged(rank: int, world: int, path: str) -> list[Tensor]:
    return Channel(path=PATHS[path]())(given(rank), KEYS)


def nothing(rank: int, world: int, path: str) -> bool:
    """Nor any number in what there is."""
    channel = Channel(path=PATHS[path]())
    return channel([], []) == [] and channel([torch.empty(0, 3)], ["x"])[0].shape == (0, 3)


def in_double(rank: int, world: int, path: str) -> list[Tensor]:
    """With a tensor that is coarser, which comes back as coarse."""
    return Channel(path=PATHS[path]())([given(rank)[0].double() / 3, given(rank)[1].bfloat16()], ["x", "y"])


def of_a_size(rank: int, world: int, path: str, numbers: int) -> dict[str, Any]:
    """A mean, the bytes that it took, and how many rounds it was said to take."""
    way, x = PATHS[path](), torch.full((numbers,), float(rank + 1))
    (mean,) = Channel(path=way)([x], ["x"])
    price = way.rehearse([x], None)
    return {
        "same": bool((mean == 1.5).all()),
        "sent": way.group.sent_bytes,
        "price": price.sent_bytes,
        "rounds": price.rounds,
    }


def weighed(rank: int, world: int, path: str) -> list[Tensor]:
    return Channel(Weigh(rank), path=PATHS[path]())([torch.full((3,), float(rank)), torch.ones(2)], ["x", "y"])


def conserved(rank: int, world: int, path: str, codec: str, calls: int) -> dict[str, Any]:
    compress = Compress(CODECS[codec], error_feedback=True)
    channel = Channel(compress, path=PATHS[path]())
    got = [channel(given(rank, call), KEYS) for call in range(calls)]
    return {"got": got, "owed": [compress.owed[key] for key in KEYS]}


def overflown(rank: int, world: int, path: str, codec: str) -> dict[str, Any]:
    """The second of four exchanges is one whose step all skip, since the last worker has a number that is not finite."""
    compress = Compress(CODECS[codec], error_feedback=True)
    channel, got, kept = Channel(compress, path=PATHS[path]()), [], False
    for call in range(4):
        mine, before = given(rank, call), dict(compress.owed)
        if call == 1 and rank == world - 1:
            mine[0][0, 0] = torch.inf  # which every codec here sends
        totals = channel(mine, KEYS)
        if call == 1:
            kept = all(torch.equal(compress.owed[key], before[key]) for key in KEYS)
            assert not totals[0].isfinite().all()
        else:
            got.append(totals)
    return {"got": got, "owed": [compress.owed[key] for key in KEYS], "kept": kept}


class Breaking(Half):
    """Half, until so many more are encoded."""

    left = math.inf

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        if not Breaking.left:
            raise LostWorkerError("gone")
        Breaking.left -= 1
        return super().encode(x, generator)


class Dying(Half):
    """Half, until so many more are encoded."""

    left = math.inf

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        if not Dying.left:
            os.kill(os.getpid(), signal.SIGKILL)
        Dying.left -= 1
        return super().encode(x, generator)


class Failing(Half):
    """Cannot encode."""

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        raise RuntimeError("no kernel for this")


def lost_midway(rank: int, world: int, path: str, encodings: int) -> dict[str, Any]:
    """The last worker dies in its third exchange, before the last message: what the others owe then."""
    compress = Compress(Dying())
    channel = Channel(compress, path=PATHS[path]())
    for call in range(2):
        channel(given(rank, call), KEYS)
    before = dict(compress.owed)
    if rank == world - 1:
        Dying.left = encodings - 1
    try:
        channel(given(rank, 2), KEYS)
    except LostWorkerError:
        kept = all(torch.equal(compress.owed[key], before[key]) for key in KEYS)
        return {"calls": channel.calls, "kept": kept}
    return {"calls": channel.calls, "kept": False}


def cannot_be_made(rank: int, world: int) -> tuple[str, bool]:
    """What is said of a codec that fails by itself, and whether a worker is taken to be lost."""
    channel = Channel(Compress(Failing()), path=PATHS["TwoPhase"]())
    try:
        channel(given(rank, 0), KEYS)
    except ExchangeError as error:
        return str(error), isinstance(error, LostWorkerError)
    return "nothing", False


def cut_anew(rank: int, world: int) -> dict[str, Any]:
    """The same tensors in other groupings, as DDP does when it rebuilds its buckets."""
    compress = Compress(Half())
    channel, got = Channel(compress, path=TwoPhase()), []
    for call, groups in enumerate(([[0, 1, 2, 3, 4]], [[4, 2], [0, 1, 3]], [[3, 1], [4], [0, 2]])):
        mine, found = given(rank, call), {}
        for group in groups:
            totals = channel([mine[at] for at in group], [KEYS[at] for at in group])
            found.update(zip(group, totals, strict=True))
        got.append([found[at] for at in range(len(KEYS))])
    return {"got": got, "owed": [compress.owed[key] for key in KEYS]}


def said(rank: int, world: int) -> list[list[str]]:
    words = [b"", b"one", "zwölf".encode(), b"x" * 1000][rank]
    return [[each.decode() for each in PATHS[name]().share(words)] for name in PATHS]


def numbers(rank: int, world: int, path: str, codec: str) -> list[list[Tensor]]:
    """Which must be the same, bit for bit, on all workers."""
    channel = Channel(Weigh(rank + 0.1), Compress(CODECS[codec]), path=PATHS[path]())
    return [channel(given(rank, call), KEYS) for call in range(3)]


def _network(*, sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    return convert_(model, ToSparse(density=0.4)).model if sparse else model


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - y).pow(2).mean().backward()
    optimizer.step()


def _data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(24, 6, generator=generator), torch.randn(24, 3, generator=generator)) for _ in range(5)]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def trained(rank: int, world: int, how: str, path: str, sparse: bool) -> dict[str, list[Tensor]]:
    """On a part of each batch, and alone on the whole."""
    model, alone = _network(sparse=sparse), _network(sparse=sparse)
    rows = slice(rank * 24 // world, (rank + 1) * 24 // world)
    if how == "every sync":
        optimizer = _sgd(model)
        with attach(model, optimizer, EverySync(Channel(path=PATHS[path]()))):
            for x, y in _data():
                _step(model, optimizer, x[rows], y[rows])
    else:
        wrapped = DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=0.001)
        wrapped.register_comm_hook(None, ddp_hook(Channel(path=PATHS[path](own_group())), wrapped, megabytes=0.0))
        optimizer = _sgd(wrapped)
        for x, y in _data():
            _step(wrapped, optimizer, x[rows], y[rows])
        model = wrapped.module
    optimizer = _sgd(alone)
    for x, y in _data():
        _step(alone, optimizer, x, y)
    return {"found": _weights(model), "expected": _weights(alone)}


def compressed_in_ddp(rank: int, world: int) -> dict[str, Any]:
    model = DistributedDataParallel(_network(sparse=False), bucket_cap_mb=0.001)
    compress = Compress(CODECS["natural"], error_feedback=True)
    model.register_comm_hook(None, ddp_hook(Channel(compress, path=TwoPhase(own_group())), model, megabytes=0.003))
    optimizer, losses = _sgd(model), []
    for x, y in _data() * 10:
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "keys": sorted(compress.owed), "names": sorted(n for n, _ in model.module.named_parameters()),
            "weights": _weights(model)}  # fmt: skip


def chosen_in_ddp(rank: int, world: int, megabytes: float, steps: int) -> dict[str, Any]:
    """Known gradients through candidates that take turns."""
    model = DistributedDataParallel(_network(sparse=False), bucket_cap_mb=0.001)
    candidates = {
        "plain": Channel(path=AllReduce(own_group())),
        "half": Channel(Compress(Half()), path=TwoPhase(own_group())),
        "low rank": PowerSGD(1, inner=Channel(path=AllReduce(own_group()))),
    }
    link = [LinkEstimate(1e-3, 1e5)]
    auto = Auto(candidates, probe=lambda: link[0], turns=2)
    model.register_comm_hook(None, ddp_hook(auto, model, megabytes=megabytes))
    generator = torch.Generator().manual_seed(rank)
    slopes = {name: torch.randn(p.shape, generator=generator) for name, p in model.module.named_parameters()}
    got: dict[str, Tensor] = {name: torch.zeros(x.shape) for name, x in slopes.items()}
    tried = []
    for step in range(steps):
        if step == steps - 1:  # by the price of a fast link: the last step pays what was owed
            link[0], auto.link, auto.turns = LinkEstimate(0.0, 1e15), None, 0
        model.zero_grad()
        out = model(torch.zeros(1, 6)).sum() * 0.0
        (out + sum((p * slopes[name]).sum() for name, p in model.module.named_parameters())).backward()
        tried.append(auto.choice)
        for name, p in model.module.named_parameters():
            assert p.grad is not None
            got[name] += p.grad
    return {
        "given": slopes,
        "got": got,
        "owed": len(auto.release()),
        "tried": tried,
        "settled": auto.settled,
        "calls": auto.calls,
    }


class Around(Wrapped):
    """A wrapper of a user's own."""

    def __init__(self, inner: Exchange) -> None:
        self._inner = inner

    @property
    def inner(self) -> Exchange:
        return self._inner


def one_group_for_both(rank: int, world: int) -> list[str]:
    model, said = DistributedDataParallel(nn.Linear(2, 2)), []
    mine, models = (Channel(path=TwoPhase(group)) for group in (own_group(), None))
    for exchange in (
        mine,
        models,
        Around(models),
        PowerSGD(1, inner=models),
        NoiseScale(models, samples=lambda: (1, 2)),
        Auto({"a": mine, "b": models}, probe=lambda: LinkEstimate(0, 1)),
    ):
        try:
            ddp_hook(exchange, model)
            said.append("taken")
        except ValueError as error:
            said.append(str(error))
    return said


def an_error_in_the_hook(rank: int, world: int) -> str:
    model = DistributedDataParallel(nn.Linear(2, 2))
    channel = Channel(path=AllGather(own_group()))
    channel.calls = rank
    model.register_comm_hook(None, ddp_hook(channel, model))
    try:
        model(torch.ones(1, 2)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def a_peer_that_is_gone(rank: int, world: int) -> str:
    channel = Channel(path=AllGather())
    try:
        for _ in range(10_000):
            channel([torch.ones(10)], ["x"])
    except ExchangeError as error:
        return str(error)
    return "went on"


def other_shapes(rank: int, world: int) -> str:
    """Whoever skips the handshake: the messages do not fit."""
    channel = Channel(Compress(CODECS["bfloat16"]), path=AllGather())
    channel.path.group.all_gather = lambda wire, fixed: type(channel.path.group).all_gather(
        channel.path.group, wire, fixed=False
    )
    try:
        channel([torch.ones(10 + rank)], ["x"])
    except ExchangeError as error:
        return str(error)
    return "taken"


def sharded(rank: int, world: int, codec: str, epochs: int) -> dict[str, Any]:
    """FSDP2 beside one worker on the whole batch."""
    from torch.distributed.fsdp import fully_shard

    model, alone = _network(sparse=False), _network(sparse=False)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    stages = fsdp_hooks(model, Exact() if codec == "exact" else CODECS[codec], error_feedback=codec != "exact")
    optimizer, single, losses = _sgd(model), _sgd(alone), []
    rows = slice(rank * 24 // world, (rank + 1) * 24 // world)
    for x, y in _data() * epochs:
        _step(model, optimizer, x[rows], y[rows])
        _step(alone, single, x, y)
        with torch.no_grad():
            losses.append((model(x) - y).pow(2).mean().item())
    return {
        "found": [p.full_tensor().detach() for p in model.parameters()],
        "expected": _weights(alone),
        "losses": losses,
        "parts": sorted(stages),
        "owed": float(sum(s.owed["gradients"].abs().sum() for s in stages.values() if s.owed)),
    }


def resumed_in_fsdp(rank: int, world: int) -> bool:
    """Whether a training that goes on from its state draws as one that never stopped."""
    from torch.distributed.fsdp import fully_shard

    def made() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Compress]]:
        model = _network(sparse=False)
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        stages = fsdp_hooks(model, NaturalCompression(), error_feedback=True)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), stages

    whole, first, second = made(), made(), made()
    for step, (x, y) in enumerate(_data()):
        part = slice(rank * 24 // world, (rank + 1) * 24 // world)
        _step(*whole[:2], x[part], y[part])
        if step == 2:
            second[0].load_state_dict(first[0].state_dict())
            for name, stage in first[2].items():
                second[2][name].load_state_dict(copy.deepcopy(stage.state_dict()))
        model, optimizer, _ = first if step < 2 else second
        _step(model, optimizer, x[part], y[part])
    mine, theirs = whole[0].parameters(), second[0].parameters()
    return all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in zip(mine, theirs, strict=True))


def overflown_in_ddp(rank: int, world: int, megabytes: float) -> list[bool]:
    """Below the second layer one worker's gradients are not finite in the third of five passes; in a sixth an exchange fails."""
    model = DistributedDataParallel(_network(sparse=False), bucket_cap_mb=0.001)
    compress, spoil = Compress(Breaking()), [False]
    model.register_comm_hook(None, ddp_hook(Channel(compress, path=TwoPhase(own_group())), model, megabytes=megabytes))
    model.module[2].register_full_backward_hook(
        lambda module, given, out: (given[0] * torch.inf if spoil[0] and rank == world - 1 else given[0],)
    )

    def as_before(x: Tensor, y: Tensor) -> bool:
        before = dict(compress.owed)
        model.zero_grad()
        with contextlib.suppress(RuntimeError):
            (model(x[rank::world]) - y[rank::world]).pow(2).mean().backward()
        return all(key in before and torch.equal(before[key], x) for key, x in compress.owed.items())

    found = []
    for step, (x, y) in enumerate(_data()):
        spoil[0] = step == 2
        found.append(as_before(x, y))
    Breaking.left = 2 if megabytes > 1.0 else world  # in the only exchange, or after the first
    found.append(as_before(*_data()[0]))
    Breaking.left = math.inf
    return found


class FailingOnce(Half):
    """Half, but for once."""

    fails = False

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        if FailingOnce.fails:
            FailingOnce.fails = False
            raise LostWorkerError("for once")
        return super().encode(x, generator)


def failed_once_in_ddp(rank: int, world: int) -> list[bool]:
    """A pass in several exchanges of which the first fails, and the others come about: is everything as before?"""
    model = DistributedDataParallel(_network(sparse=False), bucket_cap_mb=0.001)
    compress = Compress(FailingOnce())
    channel = Channel(compress, path=AllGather(own_group()))
    model.register_comm_hook(None, ddp_hook(channel, model, megabytes=1e-6))
    found = []
    for step, (x, y) in enumerate(_data()):
        FailingOnce.fails = step == 2
        before, calls = dict(compress.owed), channel.calls
        model.zero_grad()
        with contextlib.suppress(RuntimeError):
            (model(x[rank::world]) - y[rank::world]).pow(2).mean().backward()
        time.sleep(0.5)  # backward does not wait for the exchanges behind one that failed
        same = all(key in before and torch.equal(before[key], x) for key, x in compress.owed.items())
        found.append(same and channel.calls == calls)
    return found


def owed_over_a_plain_pass(rank: int, world: int) -> list[list[str]]:
    """What is still owed of what a candidate left behind, after a plain pass that is not finite, and after one that is."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), bucket_cap_mb=1e-6)
    auto = Auto({"plain": Channel(path=AllReduce(own_group()))}, probe=lambda: LinkEstimate(0.0, 1e15))
    model.register_comm_hook(None, ddp_hook(auto, model))
    auto.load_state_dict({**auto.state_dict(), "owed": {"1.bias": torch.ones(2)}})
    found = []
    for x in (torch.inf, 1.0):
        model(torch.full((1, 2), x)).sum().backward()
        model.zero_grad()
        found.append([*auto.state_dict()["owed"]])
    return found


def near_the_largest(rank: int, world: int, path: str) -> list[float]:
    return Channel(path=PATHS[path]())([torch.full((3,), 4e4, dtype=torch.float16)], ["x"])[0].tolist()


def overflown_in_fsdp(rank: int, world: int, layer: int) -> dict[str, list[bool]]:
    """Below a layer one worker's gradients are not finite in the third of five passes; in a sixth an exchange fails."""
    from torch.distributed.fsdp import fully_shard

    model, spoil = _network(sparse=False), [False]
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part)
    fully_shard(model)
    stages = fsdp_hooks(model, Breaking())
    model[layer].register_full_backward_hook(
        lambda module, given, out: (given[0] * torch.inf if spoil[0] and rank == world - 1 else given[0],)
    )
    optimizer, rows = _sgd(model), slice(rank * 24 // world, (rank + 1) * 24 // world)

    def owed() -> list[Tensor]:
        return [stage.owed["gradients"] for stage in stages.values() if stage.owed]

    def as_before(x: Tensor, y: Tensor) -> list[bool]:
        before = owed()
        optimizer.zero_grad()
        with contextlib.suppress(LostWorkerError):
            (model(x[rows]) - y[rows]).pow(2).mean().backward()
        return [torch.equal(a, b) for a, b in zip(owed(), before, strict=True)] if before else []

    found = {}
    for step, (x, y) in enumerate(_data()):
        spoil[0] = step == 2
        found[str(step)] = as_before(x, y)
        if step != 2:
            optimizer.step()
    Breaking.left = 2 * world  # two parts
    found["failed"] = as_before(*_data()[0])
    Breaking.left = math.inf
    return found


def not_sharded(rank: int, world: int) -> str:
    try:
        fsdp_hooks(nn.Linear(2, 2), Exact())
    except ValueError as error:
        return str(error)
    return "taken"


def probed(rank: int, world: int) -> list[float]:
    link = probe_link(Group())
    return [link.latency_seconds, link.bytes_per_second]


def grown_in_ddp(rank: int, world: int, name: str, skipped: bool) -> list[list[int]]:
    """Where connections are after five steps of two micro-batches, with a step that every worker skips."""
    exchange = Channel(path=AllReduce()) if world > 1 else None
    methods = {"rigl": partial(rigl, until=100), "gse": gse, "ctre": ctre}
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(12, 20, density=0.3), nn.Tanh(), SparseLinear(20, 5, density=0.3)).double()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(3)
    with attach(model, optimizer, methods[name](every=2, seed=1, exchange=exchange)):
        for step in range(5):
            for bad in [True, False] if skipped and step == 3 else [False]:
                optimizer.zero_grad()
                x = torch.randn(
                    2, 8 * 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(9) if bad else generator
                )
                for part in range(2):
                    alone = world > 1 and not part
                    with wrapped.no_sync() if alone else contextlib.nullcontext():  # pyright: ignore
                        mine = x[part].chunk(world)[rank]
                        ((wrapped(mine) - 1.0).square().mean() * (math.inf if bad else 1.0)).backward()
                if all(p.grad.isfinite().all() for p in model.parameters()):  # pyright: ignore
                    optimizer.step()
    return [layer.topology.keys().tolist() for layer in model if isinstance(layer, SparseLinear)]


def with_sharded_state(rank: int, world: int) -> float:
    """How far weights are from those of one Adam, after moves, where each rank keeps the state of some parameters only."""

    def train(make: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(SparseLinear(12, 20, density=0.3), nn.Tanh(), SparseLinear(20, 5, density=0.3))
        optimizer = make(model.parameters())
        generator = torch.Generator().manual_seed(3)
        with attach(model, optimizer, set_(every=2, seed=1)) as session:
            for _ in range(7):
                optimizer.zero_grad()
                model(torch.randn(8, 12, generator=generator)).square().mean().backward()
                optimizer.step()
        assert session.steps == 7
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    one = train(partial(torch.optim.Adam, lr=0.01))
    shared = train(partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.Adam, lr=0.01))
    return float((one - shared).abs().max())
