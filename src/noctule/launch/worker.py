"""A worker process of a supervisor: it asks to be in a group, and trains by the run's recipe."""

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from noctule.core.errors import LostWorkerError, NoctuleError, UsageError
from noctule.launch.connection import Connection
from noctule.team.group import GroupTeam, join_group
from noctule.team.member import UNTRAINED, Team, as_member_of
from noctule.team.strategies import made
from noctule.team.strategy import GroupStrategy, ServedStrategy
from noctule.transport.ticket import Ticket


class Supervised:
    """How a worker finds the others: the supervisor says when a group is formed, and the worker's rank in it.

    The end of the supervisor ends this process.

    Args:
        connection: to the supervisor.
        store: the port of its store.
        timeout_seconds: for a silent peer.
        stops_alone: whether a stop is Ctrl-C here at once, since the workers need not be at the same step.
    """

    lost = False  # on one machine the group itself is the first to notice

    def __init__(
        self, connection: Connection, *, store: int, timeout_seconds: float, stops_alone: bool = False
    ) -> None:
        self._connection, self._timeout_seconds, self._stops_alone = connection, timeout_seconds, stops_alone
        self._store = TCPStore("127.0.0.1", store, is_master=False, timeout=timedelta(seconds=timeout_seconds))
        self._groups: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.called = self.stopped = False
        threading.Thread(target=self._listen, daemon=True).start()
        self._connection.send(listening=True)

    def form(self) -> None:
        """Join the next group (see `noctule.team.group.Rendezvous`); LostWorkerError if the others have stopped without it."""
        while True:
            if dist.is_initialized():
                dist.destroy_process_group()
            self._connection.send(join=True)
            group = self._groups.get()
            if self._stops_alone and group["stopped"]:
                raise LostWorkerError("the training is to stop, and the others are not waited for")
            self.stopped = self.stopped or group["stopped"]
            name, rank, world = f"group-{group['group']}", group["rank"], group["world"]
            try:
                join_group(
                    self._store,
                    rank=rank,
                    world=world,
                    name=name,
                    timeout_seconds=self._timeout_seconds,
                    called=lambda: self.called,
                )
            except RuntimeError:  # a worker died on its way: again, with those that are left
                continue
            return

    def leave(self) -> None:
        """Leave the group for good."""
        self._connection.send(left=True)

    def again(self) -> bool:
        """True: the supervisor restarts lost workers."""
        return True

    def _listen(self) -> None:
        while messages := self._connection.receive():
            for message in messages:
                if "go" in message:
                    self.called = False  # here, in the order of the messages: another call may come right behind
                    self._groups.put(message)
                elif "stop" in message and self._stops_alone:
                    os.kill(os.getpid(), signal.SIGINT)
                    self._groups.put({"stopped": True})  # out of the wait for the others
                elif "stop" in message:
                    self.called = self.stopped = True
                elif "called" in message:
                    self.called = True
        os._exit(1)  # also out of an exchange that would wait for its time-out


def _team(connection: Connection, plan: dict[str, Any]) -> Team:
    strategy, timeout_seconds = made(plan["strategy"]), plan["timeout_seconds"]
    served = isinstance(strategy, ServedStrategy)
    rendezvous = Supervised(connection, store=plan["store"], timeout_seconds=timeout_seconds, stops_alone=served)
    if served:
        ticket = Ticket(**{**plan["ticket"], "addresses": tuple(plan["ticket"]["addresses"])})
        return strategy.team(ticket, workers=plan["workers"], timeout_seconds=timeout_seconds, meeting=rendezvous)
    assert isinstance(strategy, GroupStrategy)
    return GroupTeam(rendezvous, member=plan["member"], strategy=strategy)


def work(descriptor: int, recipe: Callable[[dict[str, Any]], None]) -> int:
    """Be the worker of the supervisor at the other end of a socket.

    Args:
        descriptor: of the socket.
        recipe: trains as the supervisor's plan says, once this process is a member of its team.
    """
    connection = Connection(socket.socket(fileno=descriptor))
    if not (messages := connection.receive()):
        return 1
    plan = messages[0]
    torch.set_num_threads(plan["threads"])
    with as_member_of(_team(connection, plan)) as team:
        team.one_machine = True
        try:
            recipe(plan)
            if not team.trained and plan["workers"] > 1:
                raise UsageError(UNTRAINED)
        except KeyboardInterrupt:
            connection.send(done=True)
            return 130
        except Exception as error:  # of any kind: the supervisor prints it
            kind = "" if isinstance(error, NoctuleError) else f"{type(error).__name__}: "
            connection.send(failed=f"{kind}{error}")
            raise
    connection.send(done=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0
