"""Compressed gradients in fully sharded training: FSDP2's reduce-scatter with a codec on its way."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter  # where FSDP2 has its contract

from noctule.codecs import Codec
from noctule.core.finite import all_finite
from noctule.exchange.compress import Compress
from noctule.exchange.group import Group
from noctule.exchange.messages import Format

_KEY = "gradients"


def fsdp_hooks(
    model: nn.Module, codec: Codec, *, error_feedback: bool | None = None, seed: int = 0
) -> dict[str, Compress]:
    """Have every `fully_shard`-ed part of a model send its gradients through a codec.

    A worker sends the others their shards of its gradient, (W - 1) / W of the compressed size, and adds up its own in float32.
    Parameters are gathered as before. For error feedback a worker keeps a number for each gradient, unsharded. Where a worker's
    gradient of any part is not finite, or an exchange fails, all parts owe what they owed before the pass, since its step is to
    be skipped. Of a sum that is not finite though all it is made of are, only the worker with that shard hears.

    Returns:
        What each part is owed, by the name of the part, for a checkpoint: save each one's ``state_dict()``.

    Raises:
        ValueError: no part of the model is sharded.
    """
    parts = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    if not parts:
        raise ValueError("nothing in this model is sharded: call torch.distributed.fsdp.fully_shard on it before")
    stages = {name: _Part(codec, error_feedback=error_feedback) for name in parts}
    account = _Pass(list(stages.values()))
    for number, (name, part) in enumerate(parts.items()):
        part.set_custom_reduce_scatter(_Scatter(stages[name], account, seed * len(parts) + number))
    return dict(stages)


class _Pass:
    """What all parts owed when a backward pass began, until it ends: the pass is delivered as a whole or not at all."""

    def __init__(self, stages: Sequence[Compress]) -> None:
        self.stages, self.failed = stages, False
        self.before: list[dict[str, Any]] | None = None
        self.number = -1

    def join(self) -> None:
        """A part is about to send."""
        number = torch._C._current_graph_task_id()
        if number != self.number:  # the last one may have broken off elsewhere
            self.number, self.failed = number, False
            self.before = [stage.state_dict() for stage in self.stages]  # no copies: debts are replaced, not changed
            Variable._execution_engine.queue_callback(self.end)  # type: ignore[attr-defined] torch has no stub for it

    def undo(self) -> None:
        """Owe what was owed."""
        for stage, state in zip(self.stages, self.before or (), strict=False):
            stage.load_state_dict(state)
        self.before, self.failed = None, True

    def end(self) -> None:
        """Let go of it."""
        self.before = None


class _Part(Compress):
    """What one part owes, and how many exchanges it has done, from which all that is drawn follows."""

    calls = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.calls = int(state["calls"])


class _Scatter(ReduceScatter):
    """One part's; it is called once in each backward pass."""

    def __init__(self, compress: _Part, account: _Pass, seed: int) -> None:
        self.compress, self.account, self.seed = compress, account, seed

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        ends, averaged = Group(group), op == dist.ReduceOp.AVG
        if not averaged and op != dist.ReduceOp.SUM:
            raise ValueError(f"compressed gradients are added up or averaged, not reduced by {op}")
        self.account.join()
        sent = self.compress.send(input_tensor, _KEY)
        try:
            total, delivered, finite = self._exchanged(sent, ends)
        except BaseException:
            self.account.undo()
            raise
        if not finite:
            self.account.undo()
        if not self.account.failed:
            self.compress.arrived(sent, delivered, _KEY)
        output_tensor.copy_(total / ends.world if averaged else total)

    def _exchanged(self, sent: Tensor, ends: Group) -> tuple[Tensor, Tensor, bool]:
        """The sum of this worker's shard, what was delivered of all that it sent, and whether everyone's is finite."""
        shards = list(sent.view(ends.world, -1))
        form = Format(shards[:1], self.compress.codec, 1)
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + self.compress.calls * ends.world + ends.rank) % 2**63
        )
        coded, delivered = [], []
        for to, shard in enumerate(shards):
            part, (read,) = form.encode([shard], generator)
            coded.append(part)
            delivered.append(shard if to == ends.rank else read)
        numbers = [float(all(map(all_finite, delivered)))]
        empty = torch.empty(0, dtype=torch.uint8)
        wires = [empty if to == ends.rank else form.message(numbers, part) for to, part in enumerate(coded)]
        size = form.nbytes
        sizes = None if size is None else [0 if sender == ends.rank else size for sender in range(ends.world)]
        total = torch.zeros_like(shards[ends.rank], dtype=torch.float32)
        for sender, wire in enumerate(ends.trade(wires, sizes=sizes)):
            if sender == ends.rank:
                total += shards[sender]
            else:
                (shard,), said = form.read(wire, sender, [_KEY])
                total += shard.to(total.device)
                numbers += said
        self.compress.calls += 1
        return total, torch.cat(delivered), all(numbers)
