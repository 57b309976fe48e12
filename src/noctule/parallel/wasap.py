"""WASAP: several workers train a truly sparse network, first asynchronously at a parameter server, then apart, and are merged.

Curci, Mocanu and Pechenizkiy 2021, "Truly sparse neural networks at scale" (WASAP-SGD), arXiv 2102.01732.
Differs from the authors' code: gradients of dropped connections are left out by the versions of the connections, not by comparing
matrices, and a connection that was dropped and grown again counts as another; places are sent once, when they move, and weights
without indices; the merge divides each connection's sum by the number of workers that have it (`noctule.parallel.merging`);
momentum is carried from the server to the workers, and through the merge. New connections begin at zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from noctule.core.exchange import Channel, Exchange
from noctule.core.method import Method
from noctule.core.phases import Phases
from noctule.exchange.local import Local
from noctule.parallel.merging import Merge
from noctule.parallel.server.push_pull import PushPull
from noctule.sparse.rewire import Rewire, set_

MOMENTUM = "momentum_buffer"
"""The key of the momentum in the state of torch's SGD."""


def wasap(
    push_pull: PushPull,
    exchange: Exchange,
    *,
    steps: int,
    rewire: Callable[..., Rewire] = set_,
    share: float = 0.7,
    seed: int = 0,
) -> Phases:
    """Make the method of one worker, for `attach`: two phases.

    In the first, all workers push to the parameter server, and worker 0 moves connections for all. In the second each worker trains
    alone and moves connections of its own, and at the last step the networks are merged. The optimizer is the server's in the first
    phase and the worker's own in the second: make both alike.

    With ``PushPull(bound=0)`` the first phase is synchronous. The batch is then that of all W workers together, and the paper's
    learning rate rises to W times that of one over the first epochs: give the server's optimizer that rate, and note that a
    scheduler in the loop moves the worker's own, which counts from the second phase on.

    Args:
        push_pull: the method of the first phase, with the number of this worker.
        exchange: between all workers, for the merge.
        steps: the number of this worker's steps in both phases.
        rewire: makes the method that moves connections, called with ``seed=`` and an ``exchange=`` with this worker alone; the
            paper moves 30 % of them after every epoch, so ``partial(set_, every=len(batches))``.
        share: the share of the steps that are in the first phase.
        seed: the seed of moves; in the second phase each worker has another one.

    >>> from noctule.parallel.server.listen import serve
    >>> with serve(SGD) as server:
    ...     method = wasap(PushPull(server.ticket(0)), Channel(path=Local.together(1)[0]), steps=1000)
    >>> method.until
    (700,)
    """
    first = round(share * steps)
    if not 0 < first < steps:
        raise ValueError(f"both phases must have steps, and share={share} of steps={steps} are {first}")
    worker, own = push_pull.server.worker, Channel(path=Local.together(1)[0])
    mover = [rewire(seed=seed, exchange=own)] if worker == 0 else []
    together = [HandOver(push_pull, at=first), *mover, push_pull]
    alone = [Merge(exchange, every=steps - first), rewire(seed=seed + 1 + worker, exchange=own)]
    return Phases(together, alone, until=[first])


class HandOver(Method):
    """After step ``at``, replaces a worker's weights by the server's, and its momentum where both have SGD with momentum.

    The worker's own momentum is of its own gradients, the server's of all workers'. Where the worker pushes sums of several
    gradients it is divided by their number. Other optimizers keep their own state.

    Args:
        push_pull: must be attached after this method.
        at: the number of the step.
    """

    def __init__(self, push_pull: PushPull, *, at: int) -> None:
        self.push_pull, self.at = push_pull, at
        self.steps, self.due = 0, False

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers

    @override
    def after_step(self) -> None:
        self.steps += 1
        self.due = self.due or self.steps == self.at
        self.settle()

    @override
    def settle(self) -> None:
        """Fetch and replace, if that is due; it stays due if it fails."""
        if not self.due:
            return
        found = self.push_pull.fetch(MOMENTUM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
                for name, p in self.push_pull.parameters.items():
                    if name in found and group["momentum"] and any(p is other for other in group["params"]):
                        mean = found[name] / self.push_pull.push_every
                        optimizer.state[p][MOMENTUM] = mean.to(p.device, p.dtype)
        self.due = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "due": self.due}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.due = int(state["steps"]), bool(state.get("due", False))  # older states lack it
