"""The process of a supervisor in which a parameter server listens; started again, it goes on from its snapshots."""

import socket
from dataclasses import asdict
from pathlib import Path

import torch

from noctule.launch.line import Line
from noctule.launch.strategies import Strategy, codec


def keep_server(descriptor: int) -> int:
    """Be the server at the other end of this socket, until that is closed: everything is in its folder then."""
    from noctule.parallel.wire import serve

    line = Line(socket.socket(fileno=descriptor))
    said = line.hear()
    if not said:
        return 1
    plan = said[0]
    strategy = Strategy(**plan["strategy"])
    torch.set_num_threads(1)
    with serve(
        strategy.server_optimizer,
        shards=strategy.shards,
        workers=plan["workers"],
        folder=Path(plan["folder"]),
        codec=codec(strategy.codec),
        patience_seconds=plan["timeout_seconds"],
    ) as server:
        line.tell(tickets=[asdict(server.ticket(worker)) for worker in range(plan["workers"])])
        while line.hear():
            pass
    return 0
