"""A stage that makes the mean over workers a weighted one."""

from torch import Tensor
from typing_extensions import override

from noctule.core.exchange import Stage


class Weigh(Stage):
    """A stage that weighs each worker by ``n``, such as the number of samples in its batch.

    With a mean of losses in every worker, the aggregate is then the gradient of the mean over the union of all batches.

    Args:
        n: the weight of this worker; set it before each exchange where it changes, to zero for a worker that has no batch.
    """

    needs_sum = True

    def __init__(self, n: float) -> None:
        self.n = n
        self.mean = 0.0
        """The mean of all workers' ``n`` in the last exchange."""

    @override
    def weight(self) -> float:
        """``n``.

        Raises:
            ValueError: it is negative or not finite.
        """
        if not 0.0 <= self.n < float("inf"):
            raise ValueError(f"a worker's weight is at least 0 and finite, got {self.n}")
        return float(self.n)

    @override
    def send(self, x: Tensor, key: str) -> Tensor:
        return x * self.n

    @override
    def close(self, total: Tensor, key: str, weight: float) -> Tensor:
        """Divide by the mean of all n; the total of workers that all have none is zero."""
        self.mean = weight
        return total / weight if weight > 0.0 else total
