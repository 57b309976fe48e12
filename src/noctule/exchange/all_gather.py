"""A path on which every worker sends its message to every other."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate, mean
from noctule.core.exchange import Arrived, Cost, Path
from noctule.exchange.group import Group
from noctule.exchange.message_format import MessageFormat, coding


class AllGather(Path):
    """A path of one round, for any codec and aggregate; a worker sends and receives W - 1 messages, so it is for few workers.

    `TwoPhase` sends less from W = 3 on, but averages only.

    Args:
        group: the process group of the workers (default: all processes).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = Group(group)
        self.rank, self.world = self.group.rank, self.group.world

    @override
    def share(self, message: bytes) -> list[bytes]:
        return self.group.share(message)

    @override
    def groups(self) -> tuple[object, ...]:
        return (self.group.group,)

    @override
    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Cost:
        write, read, size = coding(tensors, codec)
        return Cost(write + self.world * read, (self.world - 1) * size, self.group.rounds(size))

    @override
    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        form = MessageFormat(tensors, codec, len(numbers))
        wire, delivered = form.write(tensors, numbers, generator)
        wires = self.group.all_gather(wire, fixed=form.nbytes is not None)
        sums, arrivals, totals = [0.0] * len(numbers), [], [_wide_zeros(x) for x in tensors]
        for sender, each in enumerate(wires):
            found, along = form.read(each, sender, keys)
            sums = [a + b for a, b in zip(sums, along, strict=True)]
            if aggregate is mean:  # one by one, so that there is one worker's worth in memory at a time
                for total, x in zip(totals, found, strict=True):
                    total += x.to(total.device)
            else:
                arrivals.append(found)
        if aggregate is mean:
            totals = [(total / self.world).to(x.dtype) for total, x in zip(totals, tensors, strict=True)]
        else:
            totals = [x.to(like.device) for x, like in zip(aggregate(arrivals), tensors, strict=True)]
        return Arrived(totals, delivered, sums)


def _wide_zeros(x: Tensor) -> Tensor:
    """Zeros of its shape, for a sum: 16 bits are added up in 32."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
