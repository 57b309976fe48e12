"""What the strategies with a parameter server share: workers push gradients and pull weights."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from noctule.team.strategy import Meeting, ServedStrategy, TensorCoding

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from noctule.parallel.server.listen import Server
    from noctule.team.member import Team
    from noctule.transport.ticket import Ticket


@dataclass(frozen=True, kw_only=True)
class ParameterServer(ServedStrategy):
    """Gradients are pushed to a parameter server, and its weights pulled.

    Args:
        codec: of the gradients: none, bf16, natural (8 bits a number) or topk (the largest 1.56 %, with error feedback).
        meet: steps from one push and pull to the next.
        server_rate: the learning rate of the server's optimizer.
        shards: among which the parameters are partitioned; each has a thread and a port of its own.

    Raises:
        ValueError: an option is out of its range.
    """

    codec: TensorCoding = "none"
    meet: int = 1
    server_rate: float = 0.01
    shards: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.meet < 1:
            raise ValueError(f"workers push and pull after at least one step, got meet={self.meet}")
        if self.shards < 1 or not self.server_rate > 0.0:
            raise ValueError(f"shards is at least 1 and server_rate above 0, got {self.shards} and {self.server_rate}")

    @property
    @override
    def meet_every(self) -> int:
        return self.meet

    @property
    @abstractmethod
    def pushes_ahead(self) -> int | None:
        """How many pushes a worker may be ahead of the slowest one; None for any number, 0 for one step of all together."""

    def optimizer(self, parameters: "list[nn.Parameter]") -> "Optimizer":
        """The server's: Adagrad, which stands stale gradients well."""
        from torch.optim import Adagrad

        return Adagrad(parameters, lr=self.server_rate)

    @override
    def serve(
        self,
        *,
        workers: int,
        folder: Path | None = None,
        patience_seconds: float = 60.0,
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> "Server":
        import torch

        from noctule.parallel.server.listen import serve
        from noctule.team.building import codec

        torch.set_num_threads(1)  # each shard has a thread of its own
        return serve(
            self.optimizer,
            shards=self.shards,
            codec=codec(self.codec),
            workers=workers,
            folder=folder,
            patience_seconds=patience_seconds,
            host=host,
            port=port,
        )

    @override
    def team(self, ticket: "Ticket", *, workers: int, timeout_seconds: float, meeting: Meeting | None = None) -> "Team":
        from noctule.team.served import ServedTeam

        return ServedTeam(ticket, world=workers, strategy=self, timeout_seconds=timeout_seconds)
