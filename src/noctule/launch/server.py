"""The process of a supervisor that runs a strategy's server; it resumes from the server's folder."""

import socket
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from noctule.launch.connection import Connection
from noctule.team.strategies import made
from noctule.team.strategy import ServedStrategy


def keep_server(descriptor: int) -> int:
    """Run the server of the supervisor at the other end of a socket until that is closed: its folder then holds everything."""
    connection = Connection(socket.socket(fileno=descriptor))
    if not (messages := connection.receive()):
        return 1
    plan = messages[0]
    strategy, workers = made(plan["strategy"]), plan["workers"]
    assert isinstance(strategy, ServedStrategy)
    folder, patience_seconds = Path(plan["folder"]), plan["timeout_seconds"]
    with closing(strategy.serve(workers=workers, folder=folder, patience_seconds=patience_seconds)) as server:
        connection.send(tickets=[asdict(server.ticket(worker)) for worker in range(workers)])
        while connection.receive():
            pass
    return 0
