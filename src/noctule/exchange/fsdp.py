"""Compressed gradients in fully sharded training: FSDP2's reduce-scatter with a codec on its way."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter  # where FSDP2 has its contract

from noctule.codecs import Codec
from noctule.exchange.compress import Compress
from noctule.exchange.group import Group
from noctule.exchange.messages import Format

_KEY = "gradients"


def fsdp_hooks(
    model: nn.Module, codec: Codec, *, error_feedback: bool | None = None, seed: int = 0
) -> dict[str, Compress]:
    """Have every `fully_shard`-ed part of a model send its gradients through a codec.

    A worker sends the others their shards of its gradient, (W - 1) / W of the compressed size, and adds up its own in float32.
    Parameters are gathered as before. For error feedback a worker keeps a number for each gradient, unsharded.

    Returns:
        What each part is owed, by the name of the part, for a checkpoint: save each one's ``state_dict()``.

    Raises:
        ValueError: no part of the model is sharded.
    """
    parts = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    if not parts:
        raise ValueError("nothing in this model is sharded: call torch.distributed.fsdp.fully_shard on it before")
    stages = {}
    for number, (name, part) in enumerate(parts.items()):
        stages[name] = Compress(codec, error_feedback=error_feedback)
        part.set_custom_reduce_scatter(_Scatter(stages[name], seed * len(parts) + number))
    return stages


class _Scatter(ReduceScatter):
    """One part's; it is called once in each backward pass."""

    def __init__(self, compress: Compress, seed: int) -> None:
        self.compress, self.seed = compress, seed
        self.calls = 0

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        ends, averaged = Group(group), op == dist.ReduceOp.AVG
        if not averaged and op != dist.ReduceOp.SUM:
            raise ValueError(f"compressed gradients are added up or averaged, not reduced by {op}")
        sent = self.compress.send(input_tensor, _KEY)
        shards = list(sent.view(ends.world, -1))
        form = Format(shards[:1], self.compress.codec, 0)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.calls * ends.world + ends.rank) % 2**63)
        self.calls += 1
        wires, delivered = [], []
        for to, shard in enumerate(shards):
            wire, (read,) = form.write([shard], (), generator)
            wires.append(wire[:0] if to == ends.rank else wire)
            delivered.append(shard if to == ends.rank else read)
        size = form.nbytes
        sizes = None if size is None else [0 if sender == ends.rank else size for sender in range(ends.world)]
        total = torch.zeros_like(shards[ends.rank], dtype=torch.float32)
        for sender, wire in enumerate(ends.trade(wires, sizes=sizes)):
            total += shards[sender] if sender == ends.rank else form.read(wire, sender, [_KEY])[0][0].to(total.device)
        self.compress.arrived(sent, torch.cat(delivered), _KEY)
        output_tensor.copy_(total / ends.world if averaged else total)
