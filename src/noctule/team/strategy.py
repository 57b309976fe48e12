"""How workers train together and how a parameter server is kept, in the words of the command line; nothing here needs torch."""

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from noctule.core.errors import UsageError

Name = Literal["sync", "diloco", "local", "downpour", "ssp", "bsp", "wasap"]
Coding = Literal["none", "bf16", "natural", "topk", "powersgd", "auto"]

SERVED = ("downpour", "ssp", "bsp", "wasap")
"""Those whose workers meet at a parameter server; of wasap only for the first 70 % of the steps."""
ALL = "0.0.0.0"
"""Where a server listens at all addresses of its machine."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What workers exchange, how often, and in which form.

    Args:
        strategy: sync (gradients at every step), diloco (weights every ``meet`` steps, with an outer Nesterov optimizer), local
            (the plain mean of the weights every ``meet`` steps), or against a parameter server downpour (nobody waits), ssp (nobody
            is more than ``bound`` pushes ahead), bsp (all push before anybody goes on) and wasap (downpour, then each alone, then
            their networks merged).
        codec: none, bf16, natural (8 bits a number), topk (the largest 1.56 %, with error feedback), powersgd (rank 4), or auto
            (whatever is fastest on the link as measured).
        meet: steps from one meeting, or push and pull, to the next (default: 100 for diloco and local, 1 for the others).
        bound: of ssp, in pushes.
        outer_rate: the learning rate of diloco's outer optimizer.
        outer_momentum: of the same, Nesterov's; smaller suits a training of a few hundred meetings or less.
        server_rate: the learning rate at the parameter server, of Adagrad, or for wasap of SGD with momentum.
        shards: of the parameter server.

    Raises:
        ValueError: they do not go together.
    """

    strategy: Name = "sync"
    codec: Coding = "none"
    meet: int | None = None
    bound: int = 3
    outer_rate: float = 0.7
    outer_momentum: float = 0.9
    server_rate: float = 0.01
    shards: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.meet is not None and self.meet < 1:
            raise ValueError(f"workers meet after at least one step, got meet={self.meet}")
        if self.strategy == "sync" and self.meet not in (None, 1):
            raise ValueError(f"with sync workers meet at every step, got meet={self.meet}: use diloco or local")
        if self.served and self.codec in ("powersgd", "auto"):
            raise ValueError(f"{self.codec} needs workers that meet: with {self.strategy} use bf16, natural or topk")
        if not (self.outer_rate > 0.0 and 0.0 <= self.outer_momentum < 1.0):
            raise ValueError(
                f"outer_rate is above 0 and outer_momentum from 0 to less than 1, got {self.outer_rate} and {self.outer_momentum}"
            )
        if self.bound < 0 or self.shards < 1 or not self.server_rate > 0.0:
            raise ValueError(
                f"bound is at least 0, shards at least 1 and server_rate above 0, got {self.bound}, {self.shards} and "
                f"{self.server_rate}"
            )

    @property
    def served(self) -> bool:
        """Whether there is a parameter server."""
        return self.strategy in SERVED

    @property
    def equal_weights(self) -> bool:
        """Whether all workers have the same weights after every step."""
        return self.strategy == "sync"

    @property
    def exact_gradients(self) -> bool:
        """Whether workers exchange gradients, and get their mean up to rounding."""
        return self.strategy == "sync" and self.codec in ("none", "bf16")

    @property
    def meet_every(self) -> int:
        """Steps from one meeting to the next."""
        return self.meet or (100 if self.strategy in ("diloco", "local") else 1)

    @property
    def timeout_seconds(self) -> float:
        """After which a silent worker is taken to be lost; the more steps between two meetings, the longer all are silent."""
        return min(29.0 + self.meet_every, 300.0)

    @property
    def staleness_bound(self) -> int | None:
        """By how many pushes a worker may be ahead at the server."""
        return {"ssp": self.bound, "bsp": 0}.get(self.strategy)

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A server and those who train with it.

    Args:
        workers: how many train; none goes on before all have come.
        strategy: downpour (nobody waits), ssp (nobody is more than ``bound`` pushes ahead) or bsp (all push before any goes on).
        codec: of the gradients: none, bf16, natural (8 bits a number) or topk (the largest 1.56 %, with error feedback).
        meet: steps from one push and pull to the next.
        bound: of ssp, in pushes.
        server_rate: the learning rate of the server's Adagrad.
        shards: among which the parameters are dealt; each has a thread and a port of its own.
        host: the address or the network interface of this machine at which it listens; 0.0.0.0 for all of them.
        public_host: the name or address under which workers reach this machine, where that is another one.
        port: of the first shard, those of the others follow (default: any that are free, the same each time).

    Raises:
        ValueError: that cannot be.
    """

    workers: int | None = None
    strategy: Literal["downpour", "ssp", "bsp"] = "downpour"
    codec: Literal["none", "bf16", "natural", "topk"] = "none"
    meet: int = 1
    bound: int = 3
    server_rate: float = 0.01
    shards: int = 1
    host: str = "127.0.0.1"
    public_host: str | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.workers is None or self.workers < 1:
            raise ValueError(f"--workers says how many train, at least 1; got {self.workers}")
        if self.port is not None and not 0 < self.port <= 65_536 - self.shards:
            raise ValueError(f"{self.shards} ports from --port on have to lie in 1 to 65535, got {self.port}")
        if not _is_ipv4(self.host) and self.host not in [name for _, name in socket.if_nameindex()]:
            raise ValueError(
                f"--host is an IPv4 address or a network interface of this machine, got {self.host}: a name under which others "
                "know it is for --public-host"
            )
        if (self.public_host or self.host) == ALL:
            raise ValueError(
                f"{ALL} is no address to connect to: say with --public-host under which one workers reach this machine"
            )
        if self.public_host is not None and not (
            self.public_host and self.public_host.isascii() and ":" not in self.public_host
        ):
            raise ValueError(f"--public-host is a name or an IPv4 address without a port, got {self.public_host!r}")
        _ = self.together

    @property
    def together(self) -> Strategy:
        """How the workers train."""
        return Strategy(
            strategy=self.strategy,
            codec=self.codec,
            meet=self.meet,
            bound=self.bound,
            server_rate=self.server_rate,
            shards=self.shards,
        )


def several(together: Mapping[str, Any]) -> tuple[int | None, Strategy]:
    """How many workers, None for this process alone, and how they train together.

    Raises:
        UsageError: they do not go together.
    """
    workers = together.get("workers")
    options = {k: v for k, v in together.items() if k != "workers"}
    if workers is None and options:
        raise UsageError(f"{', '.join(f'--{k}' for k in options)} needs --workers, how many train together")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    try:
        return workers, Strategy(**options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
