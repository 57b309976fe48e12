"""How does a trained layer get by with fewer numbers? Low rank, shared weights, separable convolutions."""

from noctule.compress.factor.factored import Factored
from noctule.compress.factor.low_rank import Factor, low_rank, tucker2
from noctule.compress.factor.separable import ToSeparable, separable
from noctule.compress.factor.sharing import Share

__all__ = ["Factor", "Factored", "Share", "ToSeparable", "low_rank", "separable", "tucker2"]
