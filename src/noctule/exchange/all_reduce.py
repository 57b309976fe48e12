"""The plain sum of all workers, by the collective that torch's own data-parallel training uses."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from noctule.codecs import Codec
from noctule.core.aggregate import Aggregate, mean
from noctule.core.exchange import Arrived, Work
from noctule.exchange.group import Group
from noctule.exchange.messages import bundled, unbundled

_SMALL = 1 << 20
"""Bytes from which a round costs less than the copies it would save."""


class AllReduce:
    """No codec, no aggregate but the mean: what a fast link wants."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Between the members of a process group, by default of all processes."""
        self.group = Group(group)
        self.rank, self.world = self.group.rank, self.group.world

    def share(self, message: bytes) -> list[bytes]:
        """See `noctule.core.exchange.Path`."""
        return self.group.share(message)

    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Work:
        """See `noctule.core.exchange.Path`."""
        size = sum(x.nbytes for x in tensors)
        rounds = 1 if self.world == 2 and size <= _SMALL else 2 * (self.world - 1)
        return Work(0.0, 2 * (self.world - 1) / self.world * size, rounds)

    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        """See `noctule.core.exchange.Path`.

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
        """The mean in the place of ``x``, some time: without a copy or a thread, as torch's own data-parallel training has it."""
        work = dist.all_reduce(x.mul_(1.0 / self.world), group=self.group.group, async_op=True)  # multiplied, as there
        assert work is not None  # it is for processes outside the group
        self.group.count(round(2 * (self.world - 1) / self.world * x.nbytes))
        return work.get_future()

    def _sum(self, x: Tensor) -> Tensor:
        """Over all workers; of two, who would send each other as many bytes in two rounds, small ones in one."""
        if self.world != 2 or x.nbytes > _SMALL:
            return self.group.add_(x)
        a, b = self.group.gather(x.view(torch.uint8), fixed=True)
        return (a.view(x.dtype) + b.view(x.dtype)).to(x.device)


def _is_narrow(x: Tensor) -> bool:
    return torch.finfo(x.dtype).bits < 32
