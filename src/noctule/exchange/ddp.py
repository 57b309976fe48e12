"""Exchanges inside `DistributedDataParallel`: its buckets, overlapped with backward."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from noctule.core.aggregate import mean
from noctule.core.exchange import Channel, Exchange
from noctule.core.finite import all_finite
from noctule.exchange.all_reduce import AllReduce
from noctule.exchange.auto import Auto
from noctule.exchange.noise_scale import NoiseScale
from noctule.exchange.power_sgd import PowerSGD

Hook = Callable[[object, GradBucket], Future[Tensor]]


def ddp_hook(exchange: Exchange, model: DistributedDataParallel, *, megabytes: float = 25.0) -> Hook:
    """For ``model.register_comm_hook(None, ddp_hook(channel, model))``.

    Buckets are exchanged in their order by a thread of their own while backward goes on, several small ones together; by an
    exchange that wants them `at_once`, when the last is there. A plain all-reduce is torch's own, bucket by bucket, without a
    thread or a copy. What is kept of a gradient goes by the name of its parameter, so DDP may cut its buckets anew, and a
    checkpoint of the exchange's state resumes.

    Args:
        exchange: over a process group of its own (``TwoPhase(own_group())``), since DDP speaks on its group meanwhile.
        model: the wrapped model.
        megabytes: of gradients to wait for before an exchange, since each takes rounds; what is left at the end goes then.

    Raises:
        ValueError: the exchange uses the process group of the model.
    """
    if any(group is model.process_group for group in process_groups(exchange)):
        raise ValueError(
            "the exchange and DistributedDataParallel would speak on one process group at the same time: give the path one of "
            "its own, such as TwoPhase(own_group())"
        )
    buckets = _Buckets(exchange, model, megabytes)

    def hook(state: object, bucket: GradBucket) -> Future[Tensor]:
        return buckets.ready(bucket)

    return hook


class _Bucket:
    """What is needed of one after the hook has returned."""

    def __init__(self, bucket: GradBucket, names: Mapping[int, str]) -> None:
        self.buffer, self.gradients, self.last = bucket.buffer(), bucket.gradients(), bucket.is_last()
        self.keys = [names[id(p)] for p in bucket.parameters()]
        self.done: Future[Tensor] = Future()


class _Buckets:
    """Those of one backward pass after the other."""

    def __init__(self, exchange: Exchange, model: DistributedDataParallel, megabytes: float) -> None:
        self.exchange = self.now = exchange
        self.parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="noctule-exchange")
        self.waiting: list[_Bucket] = []
        self.plain: _Plain | None = None
        """This pass, where it takes nothing but all-reduces."""
        self.least_bytes = megabytes * 1e6
        self.started = 0.0
        self.before: dict[str, Any] = {}
        """What the exchange kept when the pass began, until it ends: a pass is delivered as a whole or not at all."""
        self.failed = False

    def ready(self, found: GradBucket) -> Future[Tensor]:
        if found.index() == 0:
            self._begin()
        if self.plain is not None:
            if self.plain.owes:
                self._pay(_Bucket(found, self.names))
            return self.plain.begin(found)
        bucket = _Bucket(found, self.names)
        self.waiting.append(bucket)
        enough = not self.now.at_once and sum(b.buffer.nbytes for b in self.waiting) >= self.least_bytes
        if bucket.last or enough:
            self.thread.submit(self._exchange, self.now, self.waiting)
            self.waiting = []
        return bucket.done

    def _begin(self) -> None:
        self.waiting = []  # of a pass that did not end
        if isinstance(self.exchange, Auto):
            with torch.no_grad():
                self.now = self.exchange.turn(list(self.parameters.values()), list(self.parameters))
        path = _all_reduce(self.now)
        self.plain = None if path is None else _Plain(path, self.exchange if isinstance(self.exchange, Auto) else None)
        if path is None:
            self.before, self.failed = self.now.state_dict(), False  # no copies: debts are replaced, not changed
        self.started = time.perf_counter()

    def _pay(self, bucket: _Bucket) -> None:
        """What a candidate owed that was left goes with the gradients."""
        if isinstance(self.exchange, Auto):
            with torch.no_grad():
                for x, sum_ in zip(bucket.gradients, self.exchange.paid(bucket.gradients, bucket.keys), strict=True):
                    if sum_ is not x:
                        x.copy_(sum_)

    def _exchange(self, exchange: Exchange, buckets: Sequence[_Bucket]) -> None:
        """On the thread."""
        try:
            with torch.no_grad():
                for bucket in buckets:
                    self._pay(bucket)
                gradients = [x for bucket in buckets for x in bucket.gradients]
                keys = [key for bucket in buckets for key in bucket.keys]
                totals = exchange(gradients, keys)
                self.failed = self.failed or not all(map(all_finite, totals))
                for gradient, total in zip(gradients, totals, strict=True):
                    gradient.copy_(total)
            if buckets[-1].last:
                if self.failed:  # the step will be skipped, and with it what other buckets delivered
                    exchange.load_state_dict(self.before)
                if isinstance(self.exchange, Auto):
                    self.exchange.took(time.perf_counter() - self.started, taken=not self.failed)
                self.before = {}
        except BaseException as error:  # shown where backward waits
            self.failed = True
            if self.before:
                exchange.load_state_dict(self.before)
            for bucket in buckets:
                bucket.done.set_exception(error)  # type: ignore[arg-type] torch takes any, and says Exception
        else:
            for bucket in buckets:
                bucket.done.set_result(bucket.buffer)


class _Plain:
    """All-reduces of one backward pass, with little Python: on a fast link this is what a hook costs."""

    def __init__(self, path: AllReduce, auto: Auto | None) -> None:
        self.path, self.auto = path, auto
        self.owes = auto is not None and auto.owes
        self.started = time.perf_counter()
        self.buffers: list[Tensor] = []
        self.arrivals, self.all = itertools.count(1), 0

    def begin(self, bucket: GradBucket) -> Future[Tensor]:
        self.buffers.append(bucket.buffer())
        if bucket.is_last():
            self.all = len(self.buffers)
        return self.path.begin(self.buffers[-1]).then(self._arrived)

    def _arrived(self, done: Future[list[Tensor]]) -> Tensor:
        """On a thread of the process group; not always in their order."""
        (buffer,) = done.value()
        if next(self.arrivals) == self.all and self.auto is not None:
            taken = not self.owes or all(map(all_finite, self.buffers))
            self.auto.took(time.perf_counter() - self.started, taken=taken)
        return buffer


def process_groups(exchange: Exchange) -> Iterator[object]:
    """The process groups of all that an exchange is made of."""
    if isinstance(exchange, Auto):
        for candidate in exchange.candidates.values():
            yield from process_groups(candidate)
    elif isinstance(exchange, PowerSGD):
        yield from process_groups(exchange.over)
    elif isinstance(exchange, NoiseScale):
        yield from process_groups(exchange.exchange)
    elif isinstance(exchange, Channel):
        yield getattr(getattr(exchange.path, "group", None), "group", None)


def _all_reduce(exchange: Exchange) -> AllReduce | None:
    """The path of an exchange that is nothing but an all-reduce."""
    if type(exchange) is Channel and not exchange.stages and exchange.aggregate is mean:
        return exchange.path if isinstance(exchange.path, AllReduce) else None
    return None
