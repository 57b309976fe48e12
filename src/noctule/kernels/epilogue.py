"""What can happen to a product while it is still in registers: bias, a two-slope activation, dropout."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Epilogue:
    """``dropout(activation(z))`` with activation(z) = z where z > 0 and ``slope`` times z elsewhere.

    Slope 1 is no activation, 0 is ReLU, any other a LeakyReLU or All-ReLU. The dropout mask is a function of (seed, feature,
    position in the batch) alone, so it does not depend on threads, tiles or instruction set.
    """

    slope: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def drop_below(self) -> int:
        """The 32-bit random words below this are dropped."""
        return min(round(self.dropout * 2**32), 2**32 - 1)

    @property
    def scale(self) -> float:
        """What is kept is multiplied by this, so that the mean stays."""
        return 1.0 / (1.0 - self.dropout)


IDENTITY = Epilogue()


@dataclass(frozen=True)
class Kept:
    """What the backward of an epilogue needs: two bits for each element at most."""

    epilogue: Epilogue
    positive: Tensor | None = None
    """(O, ceil(B / 8)) uint8: the bits of z > 0, the lowest first."""
    kept: Tensor | None = None
    """(O, ceil(B / 8)) uint8: the bits of what dropout kept."""

    @property
    def changed(self) -> bool:
        """Whether the gradient before the epilogue is another than behind it."""
        return self.positive is not None or self.kept is not None
