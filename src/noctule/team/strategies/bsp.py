"""A parameter server at which all workers wait for each other: bulk synchronous parallel."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from noctule.team.parameter_server import ParameterServer


@dataclass(frozen=True, kw_only=True)
class BSP(ParameterServer):
    """Gradients to a parameter server, all pushes of a round in one step: for comparing with downpour and ssp."""

    name: ClassVar[str] = "bsp"

    @property
    @override
    def pushes_ahead(self) -> int:
        return 0
