"""Every worker sends its message to every other."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate, mean
from noctule.core.exchange import Arrived, Work
from noctule.exchange.group import Group
from noctule.exchange.messages import Format, coding


class AllGather:
    """One round, any codec, any aggregate; a worker sends and receives (W - 1) messages, so it is for few workers.

    `TwoPhase` sends less from W = 3 on, but averages only.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Between the members of a process group, by default of all processes."""
        self.group = Group(group)
        self.rank, self.world = self.group.rank, self.group.world

    def share(self, message: bytes) -> list[bytes]:
        """See `noctule.core.exchange.Path`."""
        return self.group.share(message)

    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Work:
        """See `noctule.core.exchange.Path`."""
        write, read, size = coding(tensors, codec)
        return Work(write + self.world * read, (self.world - 1) * size, self.group.rounds(size))

    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        """See `noctule.core.exchange.Path`."""
        form = Format(tensors, codec, len(numbers))
        wire, delivered = form.write(tensors, numbers, generator)
        wires = self.group.gather(wire, fixed=form.nbytes is not None)
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
    """Of its shape, for a sum of several: 16 bits are added up in 32."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
