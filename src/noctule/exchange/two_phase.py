"""Compressed averaging whose cost does not grow with the workers: each averages a part, and sends that to all.

The scheme of 1-bit Adam (Tang et al. 2021, arXiv 2102.02888) and of ZeRO++ (Wang et al. 2023, arXiv 2306.10209). Differs from them:
what the second encoding leaves out is owed by the worker that made it in the same account as the first, so that error feedback
needs no second one and nothing is lost when tensors are cut differently, as when DDP rebuilds its buckets.

Shapes: W workers, n numbers in all tensors together.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.aggregate import Aggregate, mean
from noctule.channel import Arrived, Work
from noctule.codecs import Codec
from noctule.exchange.group import Group
from noctule.exchange.messages import Format, coding


class TwoPhase:
    """Cut all tensors in W parts, trade them, average one's own, send that to all: 2 (W - 1) / W of the compressed size, any W.

    Two rounds, and a codec rounds twice: of natural compression the variance is (9/8)² at most. Tensors are one vector here, so
    a codec of matrices (`LowRank`) goes with `AllGather`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Between the members of a process group, by default of all processes."""
        self.group = Group(group)
        self.rank, self.world = self.group.rank, self.group.world

    def share(self, message: bytes) -> list[bytes]:
        """See `noctule.channel.Path`."""
        return self.group.share(message)

    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Work:
        """See `noctule.channel.Path`."""
        write, read, size = coding([x.flatten() for x in tensors], codec)
        others = (self.world - 1) / self.world
        return Work(write + (1 + others) * read, 2 * others * size, 2 * (self.world - 1))

    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        """See `noctule.channel.Path`.

        Raises:
            ValueError: the aggregate is not the mean.
        """
        if aggregate is not mean:
            raise ValueError(
                f"TwoPhase averages averages, which {getattr(aggregate, '__name__', aggregate)} cannot be had from: use AllGather"
            )
        parts = cut(torch.cat([x.flatten().float() for x in tensors]), self.world)
        form = Format(parts[:1], codec, len(numbers))
        wires, delivered = [], []
        for to, part in enumerate(parts):
            wire, (read,) = form.write([part], numbers, generator)
            wires.append(wire[: 8 * len(numbers)] if to == self.rank else wire)  # a worker's own part does not travel
            delivered.append(part.clone() if to == self.rank else read)
        sizes = None
        if form.nbytes is not None:
            sizes = [wires[self.rank].numel() if sender == self.rank else form.nbytes for sender in range(self.world)]
        total, along = torch.zeros_like(parts[self.rank]), []
        for sender, wire in enumerate(self.group.trade(wires, sizes=sizes)):
            if sender == self.rank:
                total += parts[self.rank]
                along.append(list(numbers))
            else:
                (part,), theirs = form.read(wire, sender, ["a part of the average"])
                total += part.to(total.device)
                along.append(theirs)
        total /= self.world
        sums = [sum(several, 0.0) for several in zip(*along, strict=True)]
        wire, (read,) = form.write([total], sums, generator)
        delivered[self.rank] -= (total - read) * self.world  # what this encoding left out is owed too
        pieces = []
        for sender, each in enumerate(self.group.gather(wire, fixed=form.nbytes is not None)):
            (piece,), _ = form.read(each, sender, ["the average"])
            pieces.append(piece.to(total.device))
        return Arrived(joined(pieces, tensors), joined(delivered, tensors), sums)


def cut(flat: Tensor, world: int) -> list[Tensor]:
    """(n,) -> W parts of one length, the last of them filled with zeros."""
    length = -(-flat.numel() // world)
    padded = flat.new_zeros(world * length)
    padded[: flat.numel()] = flat
    return list(padded.view(world, length))


def joined(parts: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `cut`, as tensors of these shapes and dtypes."""
    flat = torch.cat(list(parts))
    sizes = [x.numel() for x in likes]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view(x.shape).to(x.dtype) for piece, x in zip(pieces, likes, strict=True)]
