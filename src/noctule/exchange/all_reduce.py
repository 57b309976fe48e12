"""The plain sum of all workers, by the collective that torch's own data-parallel training uses."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from noctule.aggregate import Aggregate, mean
from noctule.channel import Arrived, Work
from noctule.codecs import Codec
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
        self._spare: list[Tensor] = []  # for what comes of the other of two

    def share(self, message: bytes) -> list[bytes]:
        """See `noctule.channel.Path`."""
        return self.group.share(message)

    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Work:
        """See `noctule.channel.Path`."""
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
        """See `noctule.channel.Path`.

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

    def begin(self, x: Tensor) -> Future[Tensor]:
        """The mean in the place of ``x`` (n,), some time: without a thread or a copy, as torch's own data-parallel training has it.

        Two workers swap, which takes one round and fewer passes over memory than gloo's sum: they keep a tensor of that size.
        """
        x.mul_(1.0 / self.world)  # multiplied, as torch does
        self.group.count(round(2 * (self.world - 1) / self.world * x.nbytes))
        if self.world != 2 or self.group.device.type != "cpu":
            work: Any = dist.all_reduce(x, group=self.group.group, async_op=True)
            return work.get_future().then(lambda done: done.value()[0])
        found = [each for each in self._spare if each.shape == x.shape and each.dtype == x.dtype]
        self._spare = [each for each in self._spare if each is not found[0]] if found else []
        other = found[0] if found else torch.empty_like(x)
        sizes = [0, x.numel()] if self.rank == 0 else [x.numel(), 0]
        work = dist.all_to_all_single(other, x, sizes, sizes, group=self.group.group, async_op=True)

        def add(done: Future[Any]) -> Tensor:
            done.value()  # raises where the other is gone
            x.add_(other)
            self._spare.append(other)
            return x

        return work.get_future().then(add)

    def _sum(self, x: Tensor) -> Tensor:
        """Over all workers; of two, who would send each other as many bytes in two rounds, small ones in one."""
        if self.world != 2 or x.nbytes > _SMALL:
            return self.group.add_(x)
        a, b = self.group.gather(x.view(torch.uint8), fixed=True)
        return (a.view(x.dtype) + b.view(x.dtype)).to(x.device)


def _is_narrow(x: Tensor) -> bool:
    return torch.finfo(x.dtype).bits < 32
