"""On a parameter server first, then each worker alone, then merged: Curci, Mocanu, Pechenizkiy 2021, arXiv 2102.01732."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from noctule.team.parameter_server import ParameterServer
from noctule.team.strategy import Meeting

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from noctule.team.member import Team
    from noctule.transport.ticket import Ticket


@dataclass(frozen=True, kw_only=True)
class Wasap(ParameterServer):
    """Downpour for 70 % of the steps, then each worker alone with its own connections, then a merge: for truly sparse networks."""

    name: ClassVar[str] = "wasap"
    needs_supervisor: ClassVar[bool] = True

    @property
    @override
    def pushes_ahead(self) -> None:
        return None

    @override
    def optimizer(self, parameters: "list[nn.Parameter]") -> "Optimizer":
        """The server's: SGD with momentum, as the workers'."""
        from torch.optim import SGD

        return SGD(parameters, lr=self.server_rate, momentum=0.9)

    @override
    def team(self, ticket: "Ticket", *, workers: int, timeout_seconds: float, meeting: Meeting | None = None) -> "Team":
        from noctule.team.wasap import WasapTeam

        assert meeting is not None  # a supervisor starts its workers
        return WasapTeam(meeting, ticket=ticket, world=workers, strategy=self, timeout_seconds=timeout_seconds)
