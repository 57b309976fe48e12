"""The plain sum of all workers, by the collective that torch's own data-parallel training uses."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.aggregate import Aggregate, mean
from noctule.channel import Arrived, Work
from noctule.codecs import Codec
from noctule.exchange.group import Group


class AllReduce:
    """No codec, no aggregate but the mean: what a fast link wants."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Between the members of a process group, by default of all processes."""
        self.group = Group(group)
        self.rank, self.world = self.group.rank, self.group.world

    def share(self, message: bytes) -> list[bytes]:
        """See `noctule.channel.Path`."""
        return self.group.share(message)

    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Work:
        """See `noctule.channel.Path`."""
        size = sum(x.nbytes for x in tensors)
        return Work(0.0, 2 * (self.world - 1) / self.world * size, 2 * (self.world - 1))

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
            ValueError: there is a codec, or an aggregate other than the mean.
        """
        if codec is not None or aggregate is not mean:
            raise ValueError(
                "AllReduce adds numbers up on their way, so it takes no codec and no aggregate but the mean: use AllGather, "
                "or TwoPhase for a codec"
            )
        along = torch.tensor(numbers, dtype=torch.float32)
        split = {}
        for dtype in sorted({x.dtype for x in tensors} | {torch.float32}, key=str):
            parts = [x.flatten() for x in tensors if x.dtype is dtype]
            if dtype is torch.float32:
                parts.append(along.to(parts[0].device if parts else "cpu"))
            split[dtype] = iter(self.group.add_(torch.cat(parts)).split([part.numel() for part in parts]))
        means = [next(split[x.dtype]).view_as(x).div_(self.world) for x in tensors]
        return Arrived(means, list(tensors), next(split[torch.float32]).tolist())
