"""What ``noctule server`` does: keep a server in a folder, from which it resumes, and write a ticket for each worker."""

import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from noctule.core.errors import UsageError
from noctule.launch.server_ticket import ServerTicket
from noctule.report import files
from noctule.team.serving import Serving
from noctule.transport.ticket import Ticket

if TYPE_CHECKING:
    from noctule.parallel.server.listen import Server

PATIENCE_SECONDS = 60.0
"""The silence after which a worker is not waited for."""
_POLL_SECONDS = 0.5


def server_ticket(serving: Serving, ticket: Ticket) -> ServerTicket:
    """The ticket of a worker, with addresses under which it reaches the server."""
    assert serving.workers is not None
    if serving.public_host is not None:
        ports = [address.rpartition(":")[2] for address in ticket.addresses]
        ticket = replace(ticket, addresses=tuple(f"tcp://{serving.public_host}:{port}" for port in ports))
    return ServerTicket(ticket, serving.workers, serving.strategy)


def settle(folder: Path, given: Mapping[str, Any]) -> Serving:
    """The server of a folder; where there is none, the one that was given, from now on.

    Raises:
        UsageError: it is another one than given, or cannot be.
    """
    path = folder / "server.json"
    if path.exists():
        try:
            serving = Serving.made(files.read_object(path))
        except UsageError as error:
            raise UsageError(f"{path} is of a server that cannot be: {error}. Begin in another folder") from error
        kept = serving.facts()
        changed = [f"--{name.replace('_', '-')}" for name, value in given.items() if kept.get(name) != value]
        if changed:
            raise UsageError(
                f"{folder} is of a server with another {' and another '.join(changed)}: leave the options out to go on with that "
                "one, or choose another folder"
            )
        return serving
    serving = Serving.made(given)
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(path, files.to_json(serving.facts(), indent=2))
    return serving


def keep(folder: Path, given: Mapping[str, Any]) -> None:
    """Run a server until a signal ends it; its folder then holds everything, but for pushes that workers send again.

    Raises:
        UsageError: the folder is of another server.
        ExchangeError: an address is taken.
        KeyboardInterrupt: it was stopped.
    """
    serving = settle(folder, given)
    assert serving.workers is not None
    options = {"workers": serving.workers, "host": serving.host, "port": serving.port}
    with closing(serving.strategy.serve(folder=folder, patience_seconds=PATIENCE_SECONDS, **options)) as server:
        tickets = [server_ticket(serving, server.ticket(worker)) for worker in range(serving.workers)]
        paths = [folder / f"worker-{worker}.ticket" for worker in range(serving.workers)]
        for each, path in zip(tickets, paths, strict=True):
            each.save(path)
        try:
            _explain(serving, tickets[0].ticket.addresses, paths)
            _watch(cast("Server", server))
        finally:
            print(f"stopping; to go on: noctule server {shlex.quote(str(folder))}", file=sys.stderr)


def _explain(serving: Serving, addresses: tuple[str, ...], paths: list[Path]) -> None:
    where, last = ", ".join(addresses), paths[-1]
    print(f"server: {serving.strategy.name}, {len(paths)} worker{'s' * (len(paths) > 1)}, at {where}")
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
    """Print which workers come and leave, for ever."""
    there: set[int] = set()
    while True:
        states = dict(sorted(server.shards[0].states.items()))
        for worker, state in states.items():
            if state.live and worker not in there:
                print(f"worker {worker} takes part", flush=True)
            elif not state.live and worker in there:
                silent = server.shards[0].now() - state.last_message > PATIENCE_SECONDS
                print(f"worker {worker} {'is silent: it is not waited for' if silent else 'has left'}", flush=True)
        there = {worker for worker, state in states.items() if state.live}
        time.sleep(_POLL_SECONDS)
