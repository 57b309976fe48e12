"""A communication hook for `DistributedDataParallel` that exchanges its buckets while backward goes on."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from noctule.core.aggregate import mean
from noctule.core.exchange import Channel, Exchange
from noctule.core.finite import all_finite
from noctule.exchange.all_reduce import AllReduce
from noctule.exchange.undo import Undo

Hook = Callable[[object, GradBucket], Future[Tensor]]


def ddp_hook(exchange: Exchange, model: DistributedDataParallel, *, megabytes: float = 25.0) -> Hook:
    """Make a hook for ``model.register_comm_hook(None, ddp_hook(channel, model))``.

    Buckets are exchanged in their order by a thread of their own while backward goes on, several small ones together; by an
    exchange that takes them `at_once`, when the last is there. A plain all-reduce is torch's own, bucket by bucket, without a
    thread or a copy. What is kept of a gradient goes by the name of its parameter, so DDP may cut its buckets anew, and a
    checkpoint of the exchange's state resumes.

    Args:
        exchange: over a process group of its own (``TwoPhase(own_group())``), since DDP communicates in its group meanwhile.
        model: the wrapped model.
        megabytes: of gradients to wait for before an exchange, since each takes rounds; the rest goes at the end of the pass.

    Raises:
        ValueError: the exchange uses the process group of the model.
    """
    if any(group is model.process_group for group in exchange.groups()):
        raise ValueError(
            "the exchange and DistributedDataParallel would communicate in one process group at the same time: give the path one "
            "of its own, such as TwoPhase(own_group())"
        )
    return _Passes(exchange, model, megabytes).hook


class _Passes:
    """The backward passes of a model, one after the other."""

    def __init__(self, exchange: Exchange, model: DistributedDataParallel, megabytes: float) -> None:
        self.exchange, self.least_bytes = exchange, megabytes * 1e6
        self.parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="noctule-exchange")
        self.now: _PlainPass | _Pass

    def hook(self, state: object, bucket: GradBucket) -> Future[Tensor]:
        """Give a bucket to its pass, which begins with the first."""
        if bucket.index() == 0:
            with torch.no_grad():
                chosen = self.exchange.begin(list(self.parameters.values()), list(self.parameters))
            path = _all_reduce(chosen)
            if path is None:
                self.now = _Pass(self.exchange, chosen, self.names, self.thread, self.least_bytes)
            else:
                self.now = _PlainPass(self.exchange, path, self.names)
        return self.now.ready(bucket)


class _Bucket:
    """What is needed of a bucket after the hook has returned."""

    def __init__(self, bucket: GradBucket, names: Mapping[int, str]) -> None:
        self.buffer, self.gradients, self.last = bucket.buffer(), bucket.gradients(), bucket.is_last()
        self.keys = [names[id(p)] for p in bucket.parameters()]
        self.done: Future[Tensor] = Future()

    def correct(self, exchange: Exchange) -> None:
        """Add what the exchange owes to the gradients."""
        with torch.no_grad():
            for x, corrected in zip(self.gradients, exchange.corrected(self.gradients, self.keys), strict=True):
                if corrected is not x:
                    x.copy_(corrected)


class _Pass:
    """A backward pass whose buckets are exchanged on a thread."""

    def __init__(
        self, exchange: Exchange, chosen: Exchange, names: Mapping[int, str], thread: Executor, least_bytes: float
    ) -> None:
        self.exchange, self.chosen, self.names, self.thread = exchange, chosen, names, thread
        self.least_bytes = least_bytes
        self.pending: list[_Bucket] = []
        self.undo = Undo(chosen)

    def ready(self, found: GradBucket) -> Future[Tensor]:
        bucket = _Bucket(found, self.names)
        self.pending.append(bucket)
        enough = not self.chosen.at_once and sum(b.buffer.nbytes for b in self.pending) >= self.least_bytes
        if bucket.last or enough:
            self.thread.submit(self._exchange, self.pending)
            self.pending = []
        return bucket.done

    def _exchange(self, buckets: Sequence[_Bucket]) -> None:
        """Exchange several buckets together, on the thread."""
        try:
            for bucket in buckets:
                bucket.correct(self.exchange)
            gradients = [x for bucket in buckets for x in bucket.gradients]
            keys = [key for bucket in buckets for key in bucket.keys]
            with torch.no_grad():
                totals = self.chosen(gradients, keys)
                for gradient, total in zip(gradients, totals, strict=True):
                    gradient.copy_(total)
            if not all(map(all_finite, totals)):
                self.undo.failed = True
            if buckets[-1].last:
                self.undo.end()
                self.exchange.finished(delivered=not self.undo.failed)
        except BaseException as error:  # raised where backward waits
            self.undo.restore()
            for bucket in buckets:
                bucket.done.set_exception(error)  # type: ignore[arg-type] torch takes any, and says Exception
        else:
            for bucket in buckets:
                bucket.done.set_result(bucket.buffer)


class _PlainPass:
    """A backward pass of all-reduces, with little Python: on a fast link this is what a hook costs."""

    def __init__(self, exchange: Exchange, path: AllReduce, names: Mapping[int, str]) -> None:
        self.exchange, self.path, self.names = exchange, path, names
        self.corrects = exchange.corrects
        self.buffers: list[Tensor] = []
        self.arrivals, self.all = itertools.count(1), 0

    def ready(self, bucket: GradBucket) -> Future[Tensor]:
        if self.corrects:
            _Bucket(bucket, self.names).correct(self.exchange)
        self.buffers.append(bucket.buffer())
        if bucket.is_last():
            self.all = len(self.buffers)
        return self.path.begin(self.buffers[-1]).then(self._arrived)

    def _arrived(self, done: Future[list[Tensor]]) -> Tensor:
        """End the pass with its last bucket to arrive, on a thread of the process group; not always in their order."""
        (buffer,) = done.value()
        if next(self.arrivals) == self.all:
            self.exchange.finished(delivered=not self.corrects or all(map(all_finite, self.buffers)))
        return buffer


def _all_reduce(exchange: Exchange) -> AllReduce | None:
    """The path of an exchange that is nothing but an all-reduce."""
    if type(exchange) is Channel and not exchange.stages and exchange.aggregate is mean:
        return exchange.path if isinstance(exchange.path, AllReduce) else None
    return None
