"""Bytes between the processes of a `torch.distributed` group, with errors that say which worker and what to do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.errors import ExchangeError

_all_gather = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)  # the older name, which newer torch warns of


def own_group() -> dist.ProcessGroup:
    """Another process group of all processes: for an exchange that runs while DDP speaks on the usual one."""
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


class Group:
    """One worker's end of a process group.

    Args:
        group: of which this process is a member (default: the group of all processes).

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Nothing is sent yet."""
        if not dist.is_initialized():
            raise RuntimeError(
                "there is no process group yet: call torch.distributed.init_process_group first, or start with torchrun"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        """Where its messages must lie."""
        self.sent_bytes = 0
        """Of all messages so far, without what the transport adds; an all-reduce counted as a ring does it."""

    def gather(self, wire: Tensor, *, fixed: bool) -> list[Tensor]:
        """The message (uint8) of every worker, on the CPU; ``fixed`` says that all are of one length."""
        with self._speaking("all_gather"):
            sizes = [wire.numel()] * self.world if fixed else self._sizes(wire.numel())
            longest = max(sizes)
            padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
            padded[: wire.numel()] = wire
            found = torch.empty(self.world * longest, dtype=torch.uint8, device=self.device)
            _all_gather(found, padded, group=self.group)
        self.sent_bytes += (self.world - 1) * longest
        return [each[:size] for each, size in zip(found.cpu().view(self.world, longest), sizes, strict=True)]

    def trade(self, wires: Sequence[Tensor], *, sizes: Sequence[int] | None) -> list[Tensor]:
        """One message to each worker, and from each one, on the CPU; ``sizes`` of those that come, where they are known."""
        sent = [wire.numel() for wire in wires]
        with self._speaking("all_to_all"):
            if sizes is None:
                counts = torch.tensor(sent, dtype=torch.int64, device=self.device)
                found_counts = torch.empty_like(counts)
                dist.all_to_all_single(found_counts, counts, group=self.group)
                sizes = found_counts.tolist()
            found = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            dist.all_to_all_single(found, torch.cat(list(wires)).to(self.device), list(sizes), sent, group=self.group)
        self.sent_bytes += sum(sent) - sent[self.rank]
        return list(found.cpu().split(list(sizes)))

    def add_(self, x: Tensor) -> Tensor:
        """The sum over all workers, in the place of ``x`` where that is on the right device."""
        with self._speaking("all_reduce"):
            total = x.to(self.device)
            dist.all_reduce(total, group=self.group)
        self.sent_bytes += round(2 * (self.world - 1) / self.world * x.nbytes)
        return total.to(x.device)

    def share(self, message: bytes) -> list[bytes]:
        """The messages of all workers, of any lengths, in their order."""
        wire = torch.tensor(list(message), dtype=torch.uint8)
        return [bytes(each.numpy()) for each in self.gather(wire.to(self.device), fixed=False)]

    def _sizes(self, size: int) -> list[int]:
        sizes = torch.empty(self.world, dtype=torch.int64, device=self.device)
        _all_gather(sizes, torch.tensor([size], device=self.device), group=self.group)
        return sizes.tolist()

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ExchangeError(
                f"worker {self.rank} of {self.world} could not finish {what}: {error}. A worker has died or left, the link is down "
                "for longer than the group's timeout, or the workers called different things"
            ) from error
