"""What the workers of `test_hierarchical` do: five of them, as if on two machines of three and two."""

import functools
from typing import Any

import torch
from torch import Tensor

from exchange_cases import KEYS, Half, given
from noctule.codecs import NaturalCompression
from noctule.core.aggregate import median
from noctule.core.errors import ExchangeError
from noctule.core.exchange import Channel
from noctule.exchange import AllGather, AllReduce, Compress, Group, TwoPhase, Weigh
from noctule.exchange.hierarchical import Hierarchical, machines

PLACES = "aabab"
PATHS = {path.__name__: path for path in (AllGather, AllReduce, TwoPhase)}
CODECS = {"half": Half(), "natural": NaturalCompression()}


@functools.cache
def _path(rank: int, between: str) -> Hierarchical:
    return Hierarchical.over_machines(PATHS[between], machine=PLACES[rank])


def places(rank: int, world: int) -> dict[str, Any]:
    found = machines(Group(), PLACES[rank])
    return {"members": found.members, "mine": found.mine, "leaders": found.leaders}


def averaged(rank: int, world: int, between: str) -> list[Tensor]:
    mixed = [*given(rank), torch.full((3,), rank, dtype=torch.float64)]
    return Channel(Weigh(rank), path=_path(rank, between))(mixed, [*KEYS, "double"])


def conserved(rank: int, world: int, between: str, codec: str, calls: int) -> dict[str, Any]:
    """With a state that is saved and taken back on the way."""
    before, compress = (Compress(CODECS[codec], error_feedback=True) for _ in range(2))
    path = _path(rank, between)
    first, second = Channel(before, path=path), Channel(compress, path=path)
    sent = path.group.sent_bytes, path.between.group.sent_bytes if path.between else 0
    got = [first(given(rank, call), KEYS) for call in range(calls // 2)]
    second.load_state_dict(first.state_dict())
    got += [second(given(rank, call), KEYS) for call in range(calls // 2, calls)]
    return {
        "got": got,
        "owed": [compress.owed[key] for key in KEYS],
        "sent": (path.between.group.sent_bytes if path.between else 0) - sent[1],
        "price": path.rehearse(given(rank), CODECS[codec]).sent_bytes,
    }


def overflown(rank: int, world: int, between: str) -> dict[str, Any]:
    """The step of the second of four exchanges is one that all skip, for a number of a worker that speaks with no other machine."""
    compress = Compress(Half())
    channel, got, kept = Channel(compress, path=_path(rank, between)), [], False
    for call in range(4):
        mine, before = given(rank, call), dict(compress.owed)
        if call == 1 and rank == 3:
            mine[1][0] = torch.inf
        totals = channel(mine, KEYS)
        if call == 1:
            kept = all(torch.equal(compress.owed[key], before[key]) for key in KEYS)
            assert not totals[1].isfinite().all()
        else:
            got.append(totals)
    return {"got": got, "owed": [compress.owed[key] for key in KEYS], "kept": kept}


def out_of_step(rank: int, world: int) -> str:
    channel = Channel(path=_path(rank, "AllGather"))
    channel.calls = int(rank == 1)
    try:
        channel([torch.ones(3)], ["x"])
    except ExchangeError as error:
        return str(error)
    return "taken"


def refused(rank: int, world: int) -> list[str]:
    path, said = _path(rank, "AllGather"), []
    other = None if path.between else AllGather()
    for wrong in (
        lambda: Hierarchical(path.inside, other, path.group),
        lambda: Channel(path=path, aggregate=median)([torch.ones(2)], ["x"]),
    ):
        try:
            wrong()
        except ValueError as error:
            said.append(str(error))
    return said
