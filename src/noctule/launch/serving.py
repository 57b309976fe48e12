"""A parameter server for workers on any machines: a folder that it goes on from, and a ticket for each worker."""

import ipaddress
import shlex
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from noctule.errors import UsageError
from noctule.launch.invitation import Invitation
from noctule.launch.server import listen
from noctule.launch.strategies import Strategy
from noctule.parallel.ticket import Ticket
from noctule.report import files
from noctule.signature import from_json

if TYPE_CHECKING:
    from noctule.parallel.wire import Server

ALL = "0.0.0.0"
"""Where a server listens at all addresses of its machine."""
PATIENCE_SECONDS = 60.0
"""A worker that was silent for longer is not waited for."""
_LOOK_SECONDS = 0.5


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

    def invitation(self, ticket: Ticket) -> Invitation:
        """Of a worker, with addresses under which it reaches the server."""
        assert self.workers is not None
        if self.public_host is not None:
            ports = [address.rpartition(":")[2] for address in ticket.addresses]
            ticket = replace(ticket, addresses=tuple(f"tcp://{self.public_host}:{port}" for port in ports))
        return Invitation(ticket, self.workers, self.together)


def settle(folder: Path, given: Mapping[str, Any]) -> Serving:
    """What the server of a folder is, or, where there is none, is to be from now on.

    Raises:
        UsageError: it is another one than given, or cannot be.
    """
    path = folder / "server.json"
    if path.exists():
        kept = from_json(Serving, files.read_object(path))
        changed = [f"--{name.replace('_', '-')}" for name, value in given.items() if kept[name] != value]
        if changed:
            raise UsageError(
                f"{folder} is of a server with another {' and another '.join(changed)}: leave the options out to go on with that "
                "one, or choose another folder"
            )
        return Serving(**kept)
    try:
        serving = Serving(**given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(path, files.to_json(asdict(serving), indent=2))
    return serving


def keep(folder: Path, given: Mapping[str, Any]) -> None:
    """Listen until Ctrl-C or SIGTERM; everything is in the folder then, as after a kill, but for what workers send again.

    Raises:
        UsageError: the folder is of another server.
        ExchangeError: an address is taken.
        KeyboardInterrupt: it was stopped.
    """
    serving = settle(folder, given)
    assert serving.workers is not None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = {"workers": serving.workers, "host": serving.host, "port": serving.port}
    with listen(serving.together, folder=folder, patience_seconds=PATIENCE_SECONDS, **options) as server:
        invitations = [serving.invitation(server.ticket(worker)) for worker in range(serving.workers)]
        paths = [folder / f"worker-{worker}.ticket" for worker in range(serving.workers)]
        for invitation, path in zip(invitations, paths, strict=True):
            invitation.save(path)
        _explain(serving, invitations[0].ticket.addresses, paths)
        try:
            _watch(server)
        finally:
            print(f"stopping; to go on: noctule server {shlex.quote(str(folder))}", file=sys.stderr)


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _explain(serving: Serving, addresses: tuple[str, ...], paths: list[Path]) -> None:
    where, last = ", ".join(addresses), paths[-1]
    print(f"server: {serving.strategy}, {len(paths)} worker{'s' * (len(paths) > 1)}, at {where}")
    print(f"tickets: {paths[0]}{f' to {last.name}' if len(paths) > 1 else ''}; each is a secret, of one worker")
    print("copy each to its worker's machine, and train there:")
    print(f"  scp {shlex.quote(str(paths[0]))} MACHINE:")
    print(f"  noctule run RECIPE --ticket {paths[0].name}", flush=True)
    if any(address.startswith("tcp://127.") for address in addresses):
        print(
            "note: only workers on this machine reach it; for others begin in another folder, with --host",
            file=sys.stderr,
        )


def _watch(server: "Server") -> None:
    """Say who comes and goes, for ever."""
    there: set[int] = set()
    while True:
        seats = dict(sorted(server.shards[0].seats.items()))
        for worker, seat in seats.items():
            if seat.live and worker not in there:
                print(f"worker {worker} takes part", flush=True)
            elif not seat.live and worker in there:
                silent = server.shards[0].now() - seat.heard > PATIENCE_SECONDS
                print(f"worker {worker} {'is silent: nobody waits for it' if silent else 'has left'}", flush=True)
        there = {worker for worker, seat in seats.items() if seat.live}
        time.sleep(_LOOK_SECONDS)
