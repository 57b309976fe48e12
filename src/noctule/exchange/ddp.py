"""Exchanges inside `DistributedDataParallel`: its buckets, overlapped with backward."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from noctule.channel import Exchange

Hook = Callable[[object, GradBucket], Future[Tensor]]


def ddp_hook(exchange: Exchange, model: DistributedDataParallel) -> Hook:
    """For ``model.register_comm_hook(None, ddp_hook(channel, model))``.

    Buckets are exchanged in their order by a thread of their own while backward goes on. What is kept of a gradient goes by the
    name of its parameter, so DDP may cut its buckets anew, and a checkpoint of the exchange's state resumes.

    Args:
        exchange: over a process group of its own (``TwoPhase(own_group())``), since DDP speaks on its group meanwhile.
        model: the wrapped model.

    Raises:
        ValueError: the exchange uses the process group of the model.
    """
    path = getattr(exchange, "path", None)
    if path is not None and getattr(getattr(path, "group", None), "group", None) is model.process_group:
        raise ValueError(
            "the exchange and DistributedDataParallel would speak on one process group at the same time: give the path one of "
            "its own, such as TwoPhase(own_group())"
        )
    names = {id(p): name for name, p in model.module.named_parameters()}
    thread = ThreadPoolExecutor(1, thread_name_prefix="noctule-exchange")

    def hook(state: object, bucket: GradBucket) -> Future[Tensor]:
        buffer, gradients = bucket.buffer(), bucket.gradients()
        keys = [names[id(p)] for p in bucket.parameters()]
        done: Future[Tensor] = Future()

        def work() -> None:
            try:
                with torch.no_grad():
                    for gradient, total in zip(gradients, exchange(gradients, keys), strict=True):
                        gradient.copy_(total)
            except BaseException as error:  # shown where backward waits
                done.set_exception(error)  # type: ignore[arg-type]
            else:
                done.set_result(buffer)

        thread.submit(work)
        return done

    return hook
