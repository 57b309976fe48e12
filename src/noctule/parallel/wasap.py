"""Truly sparse networks trained on several workers: first on one set of weights without waiting, then apart, then merged.

Curci, Mocanu and Pechenizkiy 2021, "Truly sparse neural networks at scale" (WASAP-SGD), arXiv 2102.01732.
Differs from the authors' code: gradients of connections that are gone are left out by the versions of the connections, not by
comparing matrices, and one that was dropped and grown again counts as gone; what moved travels once, when it moves, and weights
travel without indices; the merge divides each connection's sum by those who hold it (see `noctule.parallel.merging`); momentum is
carried from the server to the workers, and through the merge. New connections begin at zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from noctule.core.exchange import Channel, Exchange
from noctule.core.method import Method
from noctule.core.phases import Phases
from noctule.exchange.local import Local
from noctule.parallel.merging import Merge
from noctule.parallel.server.push_pull import PushPull
from noctule.sparse.rewire import Rewire, set_

MOMENTUM = "momentum_buffer"
"""Under which torch's SGD keeps it."""


def wasap(
    push_pull: PushPull,
    exchange: Exchange,
    *,
    steps: int,
    rewire: Callable[..., Rewire] = set_,
    share: float = 0.7,
    seed: int = 0,
) -> Phases:
    """The phases of one worker, for `attach`.

    In the first, all push to the parameter server, and worker 0 moves connections for all. In the second each worker goes on alone,
    moving connections of its own, and at the last step the networks are merged. The optimizer is the server's in the first phase
    and the worker's own in the second: make both alike.

    With ``PushPull(bound=0)`` the first phase is synchronous. The batch is then that of all W workers together, and the paper's
    learning rate rises to W times that of one over the first epochs: give the server's optimizer that rate, and note that a
    scheduler in the loop moves the worker's own, which counts from the second phase on.

    Args:
        push_pull: to the server; its worker number tells this one's part.
        exchange: between all the workers, for the merge.
        steps: of this worker, in both phases.
        rewire: makes what moves connections, called with ``seed=`` and an ``exchange=`` that shows each worker what it sees itself;
            the paper moves 30 % of them after every epoch, so ``partial(set_, every=len(batches))``.
        share: of the steps that are in the first phase.
        seed: of what moves connections; in the second phase each worker has another one.

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
    """After a step, the worker has what the server has: its weights, and the momentum where both have SGD with momentum.

    The worker's own buffer is replaced: it is of its own gradients only, the server's of everybody's. Where the worker pushes sums
    of several gradients it is divided by their number. Other optimizers keep their own state.

    Args:
        push_pull: attached after this.
        at: the step.
    """

    def __init__(self, push_pull: PushPull, *, at: int) -> None:
        """Nothing is asked for yet."""
        self.push_pull, self.at = push_pull, at
        self.steps, self.due = 0, False

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Note who gets the momentum."""
        self.optimizers = optimizers

    def after_step(self) -> None:
        """Take over, when it is time."""
        self.steps += 1
        self.due = self.due or self.steps == self.at
        self.settle()

    def settle(self) -> None:
        """Take over, if it could not be done when it was time."""
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

    def state_dict(self) -> dict[str, Any]:
        """The steps done, and whether it is time."""
        return {"steps": self.steps, "due": self.due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps, self.due = int(state["steps"]), bool(state.get("due", False))  # older states do not say it
