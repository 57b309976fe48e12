"""Sparse layers in `DistributedDataParallel`, which sends the values of the first rank to all, whatever their places are."""

import zlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from noctule.core.optim import sparse_layers
from noctule.core.topology import Topology


def check_places_of_ranks(model: nn.Module) -> None:
    """Ask all ranks of a model, or part of one, in `DistributedDataParallel` whether their connections are at the same places.

    Raises:
        ValueError: they are not, on every rank.
    """
    for wrapped in (m for m in model.modules() if isinstance(m, DistributedDataParallel)):
        group = wrapped.process_group
        layers = sparse_layers(wrapped.module)
        if not layers or dist.get_world_size(group) == 1:
            continue
        mine = torch.tensor(
            [_checksum(m.topology) for m in layers.values()], device=next(wrapped.module.parameters()).device
        )
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyones, mine, group=group)
        differ = [name for at, name in enumerate(layers) if any(int(other[at]) != int(mine[at]) for other in everyones)]
        if differ:
            raise ValueError(
                f"the connections of {len(differ)} sparse layers differ between the ranks ({', '.join(differ[:4])}), and "
                "DistributedDataParallel has put the first rank's values at all of them: seed every rank alike before the model "
                "is made sparse, or load one rank's state dict on all, before wrapping the model"
            )


def _checksum(topology: Topology) -> int:
    return zlib.crc32(topology.keys().cpu().numpy().tobytes())
