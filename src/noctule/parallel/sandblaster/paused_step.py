"""A step of a torch optimizer that waits for each loss and gradient, instead of calling a closure that computes them."""

from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class PausedStep:
    """One `optimizer.step(closure)` in a thread of its own, whose closure waits until `advance` brings what it is to return.

    Args:
        optimizer: any that asks its closure for the loss, such as `torch.optim.LBFGS`.
        weights: its only parameter; between two calls of `advance` it holds the point whose loss is wanted.

    >>> x = nn.Parameter(torch.tensor([3.0]))
    >>> step = PausedStep(torch.optim.SGD([x], lr=0.5), x)
    >>> step.advance(), step.advance((9.0, torch.tensor([6.0]))), x.item()
    (None, 9.0, 0.0)
    """

    def __init__(self, optimizer: Optimizer, weights: nn.Parameter) -> None:
        self._optimizer, self._weights = optimizer, weights
        self._answers: SimpleQueue[tuple[float, Tensor] | None] = SimpleQueue()
        self._events: SimpleQueue[float | Exception | None] = SimpleQueue()
        self._thread = Thread(target=self._run, daemon=True, name="noctule-step")

    def advance(self, found: tuple[float, Tensor] | None = None) -> float | None:
        """Go on with the loss and gradient of the point, or, without them, begin; the first loss when the step is done, else None.

        Raises:
            Exception: the one that the optimizer raised.
        """
        if found is None:
            self._thread.start()
        else:
            self._answers.put(found)
        event = self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def abandon(self) -> None:
        """End the thread in the middle of the step: the optimizer's state and the weights are of no use afterwards."""
        if self._thread.is_alive():
            self._answers.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            self._events.put(float(self._optimizer.step(self._closure)))  # pyright: ignore[reportArgumentType] a loss came
        except Exception as error:  # for the thread that waits
            self._events.put(error)

    @torch.no_grad()
    def _closure(self) -> float:
        self._events.put(None)
        answer = self._answers.get()
        if answer is None:
            raise InterruptedError("this step was abandoned")
        loss, self._weights.grad = answer
        return loss
