"""A parameter server with a bound on staleness: Ho et al. 2013, "More effective distributed ML via a stale synchronous parallel
parameter server", NIPS.
"""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from noctule.team.parameter_server import ParameterServer


@dataclass(frozen=True, kw_only=True)
class SSP(ParameterServer):
    """Gradients to a parameter server, with a bound on how stale one may be.

    Args:
        bound: how many pushes a worker may be ahead of the slowest one.

    Raises:
        ValueError: an option is out of its range.
    """

    name: ClassVar[str] = "ssp"
    bound: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.bound < 0:
            raise ValueError(f"bound is at least 0, got {self.bound}")

    @property
    @override
    def pushes_ahead(self) -> int:
        return self.bound
