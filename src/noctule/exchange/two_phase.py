"""A path whose cost does not grow with the number of workers: each averages a part, and sends the mean to all.

The scheme of 1-bit Adam (Tang et al. 2021, arXiv 2102.02888) and of ZeRO++ (Wang et al. 2023, arXiv 2306.10209). Differs from them:
the residual of the second encoding is added to that of the first at the worker that made it, so that error feedback needs no second
one and nothing is lost when tensors are cut differently, as when DDP rebuilds its buckets.

Shapes: W workers, n numbers in all tensors together.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate, mean
from noctule.core.exchange import Arrived, Cost, Path
from noctule.exchange.all_gather import AllGather
from noctule.exchange.message_format import MessageFormat, coding


class TwoPhase(Path):
    """A path that cuts all tensors in W parts; each worker averages one part and sends the mean to all.

    A worker sends 2 (W - 1) / W of the compressed size, for any W.

    There are two rounds, and a codec rounds twice: of natural compression the variance is (9/8)² at most. Tensors are one vector
    here, so a codec of matrices (`LowRank`) goes with `AllGather`. Two workers send each other all they have: as many bytes, in one
    round, rounded once.

    Args:
        group: the process group of the workers (default: all processes).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.one_phase = AllGather(group)
        self.group = self.one_phase.group
        self.rank, self.world = self.group.rank, self.group.world

    @override
    def share(self, message: bytes) -> list[bytes]:
        return self.group.share(message)

    @override
    def groups(self) -> tuple[object, ...]:
        return (self.group.group,)

    @override
    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Cost:
        if self.world <= 2:
            return self.one_phase.rehearse(tensors, codec)
        write, read, size = coding(cut(tensors, 1), codec)
        others = (self.world - 1) / self.world
        return Cost(write + (1 + others) * read, 2 * others * size, 2 * self.group.rounds(size / self.world))

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
        """Average a part, and gather the others' parts.

        Raises:
            ValueError: the aggregate is not the mean.
        """
        if aggregate is not mean:
            raise ValueError(
                f"TwoPhase averages averages, which {getattr(aggregate, '__name__', aggregate)} cannot be had from: use AllGather"
            )
        if self.world <= 2:
            return self.one_phase(tensors, keys, codec, aggregate, numbers, generator)
        parts = cut(tensors, self.world)
        form = MessageFormat(parts[:1], codec, len(numbers))
        mine, delivered, along = parts[self.rank], list(parts), [list(numbers)] * self.world

        def wire_to(worker: int) -> Tensor:
            wire, (delivered[worker],) = form.write([parts[worker]], numbers, generator)
            return wire

        total = mine.clone()  # a worker's own part does not travel
        for sender, each in self.group.all_to_all_each(wire_to, size=form.nbytes):
            (part,), along[sender] = form.read(each, sender, ["a part of the average"])
            total += part.to(total.device)
        total /= self.world
        sums = [sum(several, 0.0) for several in zip(*along, strict=True)]
        wire, (read,) = form.write([total], sums, generator)
        delivered[self.rank] = mine - (total - read) * self.world  # what this encoding left out is owed too
        pieces = [read] * self.world
        for sender, each in self.group.all_to_all_each(lambda worker: wire, size=form.nbytes):
            (piece,), _ = form.read(each, sender, ["the average"])
            pieces[sender] = piece.to(total.device)
        return Arrived(joined(pieces, tensors), joined(delivered, tensors), sums)


def cut(tensors: Sequence[Tensor], world: int) -> list[Tensor]:
    """All their numbers, of float32 at least, in W parts of one length, the last of them filled with zeros."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    n = sum(x.numel() for x in tensors)
    room = torch.empty(-(-n // world) * world, dtype=dtype, device=tensors[0].device if tensors else "cpu")
    torch.cat([x.flatten().to(dtype) for x in tensors] or [room[:0]], out=room[:n])
    room[n:] = 0.0
    return list(room.view(world, -1)) if n else [room] * world


def joined(parts: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `cut`, as tensors of these shapes and dtypes."""
    flat = torch.cat(list(parts))
    sizes = [x.numel() for x in likes]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view(x.shape).to(x.dtype) for piece, x in zip(pieces, likes, strict=True)]
