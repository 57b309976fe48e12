"""The parameter server of a strategy, and the process of a supervisor in which one listens; both go on from their snapshots."""

import socket
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from noctule.launch.line import Line
from noctule.team.building import codec, server_optimizer
from noctule.team.strategy import Strategy

if TYPE_CHECKING:
    from noctule.parallel.server.listen import Server


def listen(strategy: Strategy, **options: Any) -> "Server":
    """A server with the optimizer, shards and codec of a strategy, in this process; options are those of `serve`."""
    from noctule.parallel.server.listen import serve

    torch.set_num_threads(1)  # each shard has a thread of its own
    return serve(partial(server_optimizer, strategy), shards=strategy.shards, codec=codec(strategy.codec), **options)


def keep_server(descriptor: int) -> int:
    """Be the server at the other end of this socket, until that is closed: everything is in its folder then."""
    line = Line(socket.socket(fileno=descriptor))
    said = line.hear()
    if not said:
        return 1
    plan = said[0]
    options = {"folder": Path(plan["folder"]), "patience_seconds": plan["timeout_seconds"]}
    with listen(Strategy(**plan["strategy"]), workers=plan["workers"], **options) as server:
        line.tell(tickets=[asdict(server.ticket(worker)) for worker in range(plan["workers"])])
        while line.hear():
            pass
    return 0
