"""The options of a server for workers on other machines; nothing here needs torch."""

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Self

from noctule.core.errors import UsageError
from noctule.team import strategies
from noctule.team.strategy import ServedStrategy

ALL = "0.0.0.0"
"""The address of a server that listens at all addresses of its machine."""
DEFAULT = "downpour"
"""The strategy where none is named."""


@dataclass(frozen=True)
class Serving:
    """A server and the workers that train with it.

    Args:
        strategy: how they train.
        workers: how many train; none goes on before all have come.
        host: the address or the network interface of this machine at which it listens; 0.0.0.0 for all of them.
        public_host: the name or address under which workers reach this machine, where that is another one.
        port: of the first shard, those of the others follow (default: any that are free, the same each time).

    Raises:
        ValueError: that cannot be.
    """

    strategy: ServedStrategy
    _: KW_ONLY
    workers: int | None = None
    host: str = "127.0.0.1"
    public_host: str | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if type(self.workers) is not int or self.workers < 1:
            raise ValueError(f"--workers says how many train, at least 1; got {self.workers}")
        ports = getattr(self.strategy, "shards", 1)
        if self.port is not None and not 0 < self.port <= 65_536 - ports:
            raise ValueError(f"{ports} ports from --port on have to lie in 1 to 65535, got {self.port}")
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

    @classmethod
    def made(cls, facts: Mapping[str, Any]) -> Self:
        """The server of these options, among them the strategy's name and options.

        Raises:
            UsageError: that cannot be.
        """
        own = {name: value for name, value in facts.items() if name in _OWN}
        others = {name: value for name, value in facts.items() if name not in _OWN}
        strategy = strategies.made({"strategy": DEFAULT} | others)
        if not isinstance(strategy, ServedStrategy) or strategy.needs_supervisor:
            raise UsageError(f"noctule server does not serve {strategy.name}: {', '.join(servable())}")
        try:
            return cls(strategy, **own)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def facts(self) -> dict[str, Any]:
        """All options as plain data, as `made` takes them."""
        return {name: getattr(self, name) for name in _OWN} | self.strategy.facts()


_OWN = tuple(each.name for each in fields(Serving) if each.name not in ("strategy", "_"))


def servable() -> list[str]:
    """The names of the strategies whose workers may be on machines of their own."""
    kinds = [strategies.chosen(name) for name in strategies.names()]
    return [kind.name for kind in kinds if issubclass(kind, ServedStrategy) and not kind.needs_supervisor]


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
