"""A path for the plain mean, by the collective that torch's own data-parallel training uses."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate, mean
from noctule.core.exchange import Arrived, Cost, Path
from noctule.exchange.group import Group
from noctule.exchange.message_format import bundled, unbundled

_SMALL = 1 << 20
"""The size in bytes from which a round costs less than the copies that would save it."""


class AllReduce(Path):
    """A path without a codec and with no aggregate but the mean: the fastest on a fast link.

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
        size = sum(x.nbytes for x in tensors)
        rounds = 1 if self.world == 2 and size <= _SMALL else 2 * (self.world - 1)
        return Cost(0.0, 2 * (self.world - 1) / self.world * size, rounds)

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
        """Add up and divide.

        Raises:
            ValueError: there is a codec, or an aggregate other than the mean.
        """
        if codec is not None or aggregate is not mean:
            raise ValueError(
                "AllReduce adds numbers up on their way, so it takes no codec and no aggregate but the mean: use AllGather, "
                "or TwoPhase for a codec"
            )
        along = torch.tensor(numbers, dtype=torch.float32, device=tensors[0].device if tensors else "cpu")
        likes = [*tensors, along]
        shares = [
            x.div_(self.world) if _is_narrow(x) else x for x in bundled(likes)
        ]  # or a sum of 16 bits may overflow
        *sums, along = unbundled([self._sum(x) for x in shares], likes)
        means = [x if _is_narrow(x) else x.div_(self.world) for x in sums]
        return Arrived(means, list(tensors), along.tolist())

    def begin(self, x: Tensor) -> Future[list[Tensor]]:
        """Start the mean in place of ``x``: without a copy or a thread, as torch's own data-parallel training does it."""
        work = dist.all_reduce(x.mul_(1.0 / self.world), group=self.group.group, async_op=True)  # multiplied, as there
        assert work is not None  # it is for processes outside the group
        self.group.count(round(2 * (self.world - 1) / self.world * x.nbytes))
        return work.get_future()

    def _sum(self, x: Tensor) -> Tensor:
        """The sum over all workers; small tensors of two workers in one round, with as many bytes as the two of an all-reduce."""
        if self.world != 2 or x.nbytes > _SMALL:
            return self.group.all_reduce_(x)
        a, b = self.group.all_gather(x.view(torch.uint8), fixed=True)
        return (a.view(x.dtype) + b.view(x.dtype)).to(x.device)


def _is_narrow(x: Tensor) -> bool:
    return torch.finfo(x.dtype).bits < 32
