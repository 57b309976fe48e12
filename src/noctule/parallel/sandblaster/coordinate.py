"""Start the coordinator of Sandblaster: its sockets, keys and folder."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import nn
from torch.optim import Optimizer

from noctule.parallel.sandblaster.coordinator import Coordinator
from noctule.transport.ticket import Keys, Ticket

STRONG_WOLFE = partial(torch.optim.LBFGS, history_size=10, line_search_fn="strong_wolfe")
"""L-BFGS with a line search, which needs no learning rate."""


def coordinate(
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = STRONG_WOLFE,
    *,
    folder: str | Path | None = None,
    host: str = "127.0.0.1",
    max_bytes: int = 1 << 30,
) -> "Coordination":
    """Start a coordinator that workers with a `Sandblaster` connect to, in a thread of this process, until it is closed.

    It holds the weights, the sums of gradients and the optimizer. In a folder it keeps its keys, its address and its state at the
    end of each step, and continues from there when it is started again; the step that was not completed is done again.

    Args:
        optimizer: makes the optimizer of a list of parameters, which here is one vector; `torch.optim.LBFGS` with its options
            bound by `functools.partial`, or any other one that takes a closure.
        folder: where the state is kept; None for nowhere.
        host: the address of this machine at which workers reach it; by default only those on this machine do.
        max_bytes: the largest message, which has the size of the weights.

    Raises:
        ExchangeError: the address is taken.
    """
    home = None if folder is None else Path(folder)
    coordinator = Coordinator(optimizer, folder=home and home / "steps")
    return Coordination(coordinator, home and home / "keys.json", host=host, max_bytes=max_bytes)


class Coordination:
    """A coordinator that is running; `coordinate` makes it."""

    def __init__(self, coordinator: Coordinator, path: Path | None, *, host: str, max_bytes: int) -> None:
        from noctule.transport.sockets import ServerThread, new_pair

        self._coordinator, self._keys = coordinator, Keys(path, pair=new_pair, addresses=[f"tcp://{host}:*"])
        self._thread = ServerThread(coordinator, self._keys.addresses[0], self._keys, max_bytes=max_bytes, frames=8)
        self._keys.addresses = self.addresses = (self._thread.address,)
        try:
            self._keys.save()
        except BaseException:
            self._thread.end()
            raise
        self._thread.start()

    def ticket(self, worker: int) -> Ticket:
        """The ticket of a worker; the same at each call."""
        return self._keys.ticket(worker)

    @property
    def losses(self) -> list[float]:
        """The loss of the whole batch at the beginning of each completed step."""
        return list(self._coordinator.losses)

    @property
    def counted(self) -> Counter[int]:
        """For each worker, how many portions it was the first to compute."""
        return Counter(dict(self._coordinator.counted))

    @property
    def wasted(self) -> Counter[int]:
        """For each worker, how many portions it computed after another worker had."""
        return Counter(dict(self._coordinator.wasted))

    def close(self) -> None:
        """Stop, when all workers are done; a second call does nothing."""
        self._thread.end()
        self._coordinator.close()

    def __enter__(self) -> Self:
        """Return this coordination."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Show the address; no keys."""
        return f"Coordination({self.addresses[0]})"
