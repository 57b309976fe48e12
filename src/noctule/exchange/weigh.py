"""Workers count as much as they have done."""

from torch import Tensor

from noctule.core.exchange import Stage


class Weigh(Stage):
    """Makes the mean a weighted one: of workers with unequal batches, ``n`` being the samples of each.

    With a mean of losses in every worker, the aggregate is then the gradient of the mean over the union of all batches.

    Args:
        n: of this worker; set it anew before an exchange where it changes, zero for a worker that has none.
    """

    needs_sum = True

    def __init__(self, n: float) -> None:
        """Every worker says its own."""
        self.n = n
        self.mean = 0.0
        """Of all workers' n in the last exchange."""

    def weight(self) -> float:
        """``n``.

        Raises:
            ValueError: it is negative or not finite.
        """
        if not 0.0 <= self.n < float("inf"):
            raise ValueError(f"a worker's weight is at least 0 and finite, got {self.n}")
        return float(self.n)

    def send(self, x: Tensor, key: str) -> Tensor:
        """Times n."""
        return x * self.n

    def close(self, total: Tensor, key: str, weight: float) -> Tensor:
        """Over the mean of all n; zero where nobody has anything."""
        self.mean = weight
        return total / weight if weight > 0.0 else total
