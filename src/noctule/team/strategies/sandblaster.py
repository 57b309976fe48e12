"""L-BFGS on large batches, cut in portions for whichever worker is free: see `noctule.parallel.sandblaster.optimizer`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from noctule.team.strategy import Meeting, RunningServer, ServedStrategy

if TYPE_CHECKING:
    from noctule.team.member import Team
    from noctule.transport.ticket import Ticket


@dataclass(frozen=True, kw_only=True)
class Sandblaster(ServedStrategy):
    """L-BFGS on large batches in place of the recipe's optimizer, each batch computed by whichever worker is free.

    Args:
        batches: how many of the recipe's batches are in one step; 0 for all of an epoch.
        directions: at most so many in one step, each with a line search.
        history: how many steps the curvature is taken from.

    Raises:
        ValueError: an option is out of its range.
    """

    name: ClassVar[str] = "sandblaster"
    needs_supervisor: ClassVar[bool] = True
    batches: int = 0
    directions: int = 10
    history: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.batches < 0 or min(self.directions, self.history) < 1:
            raise ValueError(
                f"batches is at least 0, directions and history at least 1, got {self.batches}, {self.directions} and "
                f"{self.history}"
            )

    @override
    def serve(
        self,
        *,
        workers: int,
        folder: Path | None = None,
        patience_seconds: float = 60.0,
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> RunningServer:
        import torch

        from noctule.parallel import coordinate

        lbfgs = partial(
            torch.optim.LBFGS, max_iter=self.directions, history_size=self.history, line_search_fn="strong_wolfe"
        )
        return coordinate(lbfgs, folder=folder, host=host)

    @override
    def team(self, ticket: "Ticket", *, workers: int, timeout_seconds: float, meeting: Meeting | None = None) -> "Team":
        from noctule.team.sandblaster import SandblasterTeam

        return SandblasterTeam(ticket, world=workers, strategy=self, timeout_seconds=timeout_seconds)
