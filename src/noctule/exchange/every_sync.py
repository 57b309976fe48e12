"""Synchronous training in a plain loop: gradients are exchanged when backward ends."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from noctule.core.exchange import Exchange
from noctule.core.method import Method
from noctule.core.remap import Remap
from noctule.exchange.handshake import agree, agree_on_places


class EverySync(Method):
    """Each backward pass ends with an exchange, so unscaling, clipping and the step see the gradient of all workers.

    An overflow on one worker is one on all, since what is not finite reaches everyone. Not in `before_step`: a step that one worker
    skips would pair different steps. A parameter that had no gradient here sends zeros, and gets what the others have. Before
    the first exchange, and the first one after a state was loaded, the workers compare their models; after connections have moved,
    their places. Reentrant checkpoints (``use_reentrant=True``) are backward passes of their own, and cost an exchange each.

    Args:
        exchange: such as a `Channel`.

    >>> from noctule.exchange import Local
    >>> from noctule.core.exchange import Channel
    >>> sync = EverySync(Channel(path=Local.together(1)[0]))
    """

    def __init__(self, exchange: Exchange) -> None:
        """Nothing is sent yet."""
        self.exchange = exchange
        self._paused = self._agreed = self._moved = False
        self._pass = -1  # the last one whose end is waited for, by torch's number
        self._undo = ExitStack()

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Listen for the end of each backward pass."""
        self.model, self._agreed, self._moved = model, False, False
        self._listening: set[nn.Parameter] = set()
        self._listen()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward passes in here only add to the gradients, as of micro-batches; the next one outside exchanges the sum."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def now(self) -> None:
        """Exchange what is in ``grad``: for a worker that had no batch, and after passes that were `paused`.

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

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        """What is kept for the layer's gradients follows its connections."""
        prefix = next(name for name, module in self.model.named_modules() if module is layer)
        for name, p in layer.named_parameters(recurse=False):
            if (part := remap.of(name)) is not None:
                self.exchange.remapped(f"{prefix}.{name}" if prefix else name, part, tuple(p.shape))
        self._moved = True
        self._listen()

    def end(self) -> None:
        """Stop listening."""
        self._undo.close()
        self._listening.clear()

    def state_dict(self) -> dict[str, Any]:
        """The exchange's."""
        return {"exchange": self.exchange.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.exchange.load_state_dict(state["exchange"])
        self._agreed = False

    def _used(self, parameters: Sequence[nn.Parameter], totals: Sequence[Tensor]) -> list[bool]:
        """Which of them had a gradient on any worker: a zero total does not say, and to an optimizer zero is not none."""
        used = [_has_any(total) for total in totals]
        if all(used):
            return used
        mine = bytes(p.grad is not None for p, known in zip(parameters, used, strict=True) if not known)
        others = (any(said) for said in zip(*self.exchange.share(mine), strict=True))
        return [known or next(others) for known in used]

    def _listen(self) -> None:
        """To parameters that are new too."""
        for p in self.model.parameters():
            if p.requires_grad and p not in self._listening:
                self._listening.add(p)
                self._undo.callback(p.register_post_accumulate_grad_hook(self._accumulated).remove)

    def _accumulated(self, p: Tensor) -> None:
        number = torch._C._current_graph_task_id()  # of a pass that broke off, the end does not come
        if number != self._pass and not self._paused:
            self._pass = number
            # as DDP and FSDP2 hear of the end of a backward pass: torch has no public way
            Variable._execution_engine.queue_callback(self.now)  # type: ignore[attr-defined] torch has no stub for it


def _has_any(x: Tensor) -> bool:
    """Whether a number is not zero, which the first ones mostly tell."""
    flat = x.flatten()
    return bool(flat[:256].any()) or bool(flat.any())
