"""Synchronous data-parallel training in a plain loop: gradients are exchanged at the end of backward."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer
from typing_extensions import override

from noctule.core.exchange import Exchange
from noctule.core.method import Method
from noctule.core.remap import Remap
from noctule.exchange.handshake import agree, agree_on_places


class EverySync(Method):
    """Exchanges gradients at the end of each backward pass, so unscaling, clipping and the step see the gradient of all workers.

    An overflow on one worker is one on all, since a number that is not finite reaches every worker. The exchange is not in
    `before_step`: a step that one worker skips would pair different steps. A parameter that had no gradient here sends zeros, and
    gets the aggregate of the others. Before the first exchange, and the first one after a state was loaded, the workers compare
    their models; after connections have moved, their places. Reentrant checkpoints (``use_reentrant=True``) are backward passes of
    their own, and cost an exchange each.

    Args:
        exchange: such as a `Channel`.

    >>> from noctule.exchange import Channel, Local
    >>> sync = EverySync(Channel(path=Local.together(1)[0]))
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._paused = self._agreed = self._moved = False
        self._pass = -1  # the last one whose end was to call `now`, by torch's number
        self._undo = ExitStack()

    @override
    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.model, self._agreed, self._moved = model, False, False
        self._hooked: set[nn.Parameter] = set()
        self._hook_parameters()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which backward only adds to the gradients, as of micro-batches; the next pass outside exchanges the sum."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def now(self) -> None:
        """Exchange the gradients: for a worker that had no batch, and after passes that were `paused`.

        Raises:
            ExchangeError: the models of the workers differ, or connections moved differently; LostWorkerError where one is gone.
        """
        if not self._agreed:
            agree(self.exchange, self.model, {"exchange": self.exchange})
        elif self._moved:
            agree_on_places(self.exchange, self.model)
        self._agreed, self._moved = True, False
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        mine = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]
        with torch.no_grad():
            totals = self.exchange(mine, [name for name, _ in named])
            for (_, p), total, used in zip(named, totals, self._used([p for _, p in named], totals), strict=True):
                if p.grad is not None:
                    p.grad.copy_(total)
                elif used:
                    p.grad = total.clone()

    @override
    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        prefix = next(name for name, module in self.model.named_modules() if module is layer)
        for name, p in layer.named_parameters(recurse=False):
            if (part := remap.of(name)) is not None:
                self.exchange.remapped(f"{prefix}.{name}" if prefix else name, part, tuple(p.shape))
        self._moved = True
        self._hook_parameters()

    @override
    def end(self) -> None:
        self._undo.close()
        self._hooked.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"exchange": self.exchange.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.exchange.load_state_dict(state["exchange"])
        self._agreed = False

    def _used(self, parameters: Sequence[nn.Parameter], totals: Sequence[Tensor]) -> list[bool]:
        """Which parameters had a gradient on any worker: a total of zero does not say, and to an optimizer zero is not None."""
        used = [_has_any(total) for total in totals]
        if all(used):
            return used
        mine = bytes(p.grad is not None for p, known in zip(parameters, used, strict=True) if not known)
        others = (any(flags) for flags in zip(*self.exchange.share(mine), strict=True))
        return [known or next(others) for known in used]

    def _hook_parameters(self) -> None:
        """Hook each parameter that has no hook yet."""
        for p in self.model.parameters():
            if p.requires_grad and p not in self._hooked:
                self._hooked.add(p)
                self._undo.callback(p.register_post_accumulate_grad_hook(self._accumulated).remove)

    def _accumulated(self, p: Tensor) -> None:
        number = torch._C._current_graph_task_id()  # a pass that broke off has no end
        if number != self._pass and not self._paused:
            self._pass = number
            # as DDP and FSDP2 do: torch has no public hook for the end of a backward pass
            Variable._execution_engine.queue_callback(self.now)  # type: ignore[attr-defined] torch has no stub for it


def _has_any(x: Tensor) -> bool:
    """Whether a number is not zero; mostly the first ones decide."""
    flat = x.flatten()
    return bool(flat[:256].any()) or bool(flat.any())
