"""A parameter server at which no worker waits: Dean et al. 2012, "Large scale distributed deep networks" (Downpour SGD), NIPS."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from noctule.team.parameter_server import ParameterServer


@dataclass(frozen=True, kw_only=True)
class Downpour(ParameterServer):
    """Gradients to a parameter server without waiting: for workers of different speed."""

    name: ClassVar[str] = "downpour"

    @property
    @override
    def pushes_ahead(self) -> None:
        return None
