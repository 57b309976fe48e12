"""Exchanges and codecs by the names that they have on the command line."""

from collections.abc import Callable
from typing import get_args

import torch
import torch.distributed as dist

from noctule.codecs import Cast, Codec, NaturalCompression, TopK
from noctule.core.exchange import Channel, Exchange, Path, Stage
from noctule.exchange import (
    AllGather,
    AllReduce,
    Auto,
    Compress,
    Group,
    Hierarchical,
    PowerSGD,
    TwoPhase,
    Weigh,
    probe_link,
)
from noctule.team.strategy import Coding, TensorCoding

TOP, LEAST = 0.0156, 256
"""The share of the numbers that `topk` sends, each as one byte of natural compression, and how many of each tensor at least."""
RANK = 4
"""The rank of `powersgd`."""


def exchange(
    coding: Coding,
    weigh: Weigh | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    per_machine: int | None = None,
) -> Exchange:
    """An exchange between the members of a process group as it is.

    Args:
        coding: what travels.
        weigh: how much a worker's tensors count; None where each worker's count as much.
        group: the process group (default: of all processes).
        per_machine: how many workers add up what they have before one of them exchanges it; 0 for those of each machine, None for
            no such level.
    """
    if coding == "auto":
        names: tuple[Coding, ...] = tuple(name for name in get_args(Coding) if name != "auto")
        return Auto(
            {name: exchange(name, weigh, group=group) for name in names}, probe=lambda: probe_link(Group(group))
        )
    stages: list[Stage] = [] if weigh is None else [weigh]

    def path(kind: Callable[[dist.ProcessGroup | None], Path]) -> Path:
        if per_machine is None:
            return kind(group)
        machine = str(dist.get_rank() // per_machine) if per_machine else None
        return Hierarchical.over_machines(kind, machine=machine)

    if coding == "powersgd":
        return PowerSGD(RANK, inner=Channel(*stages, path=path(AllReduce)))
    of_tensors = codec(coding)
    if of_tensors is None:
        return Channel(*stages, path=path(AllReduce))
    return Channel(*stages, Compress(of_tensors), path=path(AllGather if coding == "topk" else TwoPhase))


def codec(coding: TensorCoding) -> Codec | None:
    """The codec of single tensors of that name; None for tensors as they are."""
    codecs: dict[TensorCoding, Codec | None] = {
        "none": None,
        "bf16": Cast(torch.bfloat16),
        "natural": NaturalCompression(),
        "topk": TopK(TOP, at_least=LEAST, values=NaturalCompression()),
    }
    return codecs[coding]
