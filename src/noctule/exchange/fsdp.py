"""Compressed gradients in fully sharded training: a reduce-scatter with a codec for FSDP2."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter  # where FSDP2 has its contract
from typing_extensions import override

from noctule.codecs import Codec
from noctule.core.finite import all_finite
from noctule.core.random import generator
from noctule.exchange.compress import Compress
from noctule.exchange.group import Group
from noctule.exchange.message_format import MessageFormat
from noctule.exchange.undo import Undo

_KEY = "gradients"


def fsdp_hooks(
    model: nn.Module, codec: Codec, *, error_feedback: bool | None = None
) -> dict[str, "CompressedReduceScatter"]:
    """Have every `fully_shard`-ed part of a model send its gradients through a codec.

    A worker sends the others their shards of its gradient, (W - 1) / W of the compressed size, and adds up its own shard in
    float32. Parameters are gathered as before. For error feedback a worker keeps a number for each gradient, unsharded. If a
    worker's gradient of any part is not finite, or an exchange fails, all parts keep the residuals from before the pass, since its
    step is to be skipped. If only a sum is not finite, the worker with that shard alone knows.

    Returns:
        What exchanges the gradients of each part, by the name of the part; for a checkpoint save each one's ``state_dict()``.

    Raises:
        ValueError: no part of the model is sharded.
    """
    parts = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    if not parts:
        raise ValueError("nothing in this model is sharded: call torch.distributed.fsdp.fully_shard on it before")
    passes = _Passes()
    passes.parts = [CompressedReduceScatter(name, codec, error_feedback, passes) for name in parts]
    for module, part in zip(parts.values(), passes.parts, strict=True):
        module.set_custom_reduce_scatter(part)
    return dict(zip(parts, passes.parts, strict=True))


class _Passes:
    """The backward passes, one after the other: the parts of each are delivered as a whole or not at all."""

    def __init__(self) -> None:
        self.parts: list[CompressedReduceScatter] = []
        self.number, self.undo = -1, Undo()

    def join(self) -> Undo:
        """The pass that a part is about to send in."""
        number = torch._C._current_graph_task_id()
        if number != self.number:  # the last one may have broken off elsewhere
            self.number, self.undo = number, Undo(*self.parts)
            Variable._execution_engine.queue_callback(self.undo.end)  # type: ignore[attr-defined] torch has no stub for it
        return self.undo


class CompressedReduceScatter(ReduceScatter):
    """The reduce-scatter of one part's gradients through a codec, called once in each backward pass."""

    def __init__(self, name: str, codec: Codec, error_feedback: bool | None, passes: _Passes) -> None:
        self._name, self._passes = name, passes
        self._compress = Compress(codec, error_feedback=error_feedback)
        self._calls = 0

    @property
    def owed(self) -> dict[str, Tensor]:
        """The residual of the part's gradients, if there is one."""
        return self._compress.owed

    def state_dict(self) -> dict[str, Any]:
        """The residual, and the number of exchanges done, from which all random draws follow."""
        return {**self._compress.state_dict(), "calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._compress.load_state_dict(state)
        self._calls = int(state["calls"])

    @override
    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @override
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        ends, averaged = Group(group), op == dist.ReduceOp.AVG
        if not averaged and op != dist.ReduceOp.SUM:
            raise ValueError(f"compressed gradients are added up or averaged, not reduced by {op}")
        undo = self._passes.join()
        sent = self._compress.send(input_tensor, _KEY)
        try:
            total, delivered, finite = self._exchanged(sent, ends)
        except BaseException:
            undo.restore()
            raise
        if not finite:
            undo.restore()
        if not undo.failed:
            self._compress.arrived(sent, delivered, _KEY)
        output_tensor.copy_(total / ends.world if averaged else total)

    def _exchanged(self, sent: Tensor, ends: Group) -> tuple[Tensor, Tensor, bool]:
        """The sum of this worker's shard, what was delivered of all that it sent, and whether every worker's is finite."""
        shards = list(sent.view(ends.world, -1))
        form = MessageFormat(shards[:1], self._compress.codec, 1)
        draws = generator("fsdp", self._name, self._calls, ends.rank)
        coded, delivered = [], []
        for to, shard in enumerate(shards):
            part, (read,) = form.encode([shard], draws)
            coded.append(part)
            delivered.append(shard if to == ends.rank else read)
        numbers = [float(all(map(all_finite, delivered)))]
        empty = torch.empty(0, dtype=torch.uint8)
        wires = [empty if to == ends.rank else form.message(numbers, part) for to, part in enumerate(coded)]
        size = form.nbytes
        sizes = None if size is None else [0 if sender == ends.rank else size for sender in range(ends.world)]
        total = torch.zeros_like(shards[ends.rank], dtype=torch.float32)
        for sender, wire in enumerate(ends.all_to_all(wires, sizes=sizes)):
            if sender == ends.rank:
                total += shards[sender]
            else:
                (shard,), along = form.read(wire, sender, [_KEY])
                total += shard.to(total.device)
                numbers += along
        self._calls += 1
        return total, torch.cat(delivered), all(numbers)
