"""A supervisor's worker: it asks to be in a group, and trains by the run's recipe."""

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
from noctule.launch.line import Line
from noctule.team.group import Together, join_group
from noctule.team.member import UNTRAINED, Team, as_member_of
from noctule.team.served import Apart
from noctule.team.strategy import Strategy
from noctule.team.wasap import Merging
from noctule.transport.ticket import Ticket


class Supervised:
    """How a worker finds the others: the supervisor says when, and in which place."""

    lost = False  # on one machine the group itself is the first to know

    def __init__(self, line: Line, *, store: int, timeout_seconds: float, stops_alone: bool = False) -> None:
        """Listen from now on; the end of the supervisor is the end of this process.

        Args:
            line: to the supervisor.
            store: its port.
            timeout_seconds: for a silent peer.
            stops_alone: whether Ctrl-C there is one here at once, since the workers need not be at the same step.
        """
        self._line, self._timeout_seconds, self._stops_alone = line, timeout_seconds, stops_alone
        self._store = TCPStore("127.0.0.1", store, is_master=False, timeout=timedelta(seconds=timeout_seconds))
        self._sent_off: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.called = self.stopped = False
        threading.Thread(target=self._listen, daemon=True).start()
        self._line.tell(listening=True)

    def form(self) -> None:
        """See `noctule.team.group.Rendezvous`; LostWorkerError where the others have stopped alone."""
        while True:
            if dist.is_initialized():
                dist.destroy_process_group()
            self._line.tell(join=True)
            words = self._sent_off.get()
            if self._stops_alone and words["stopped"]:
                raise LostWorkerError("the training is to stop, and the others are not waited for")
            self.stopped = self.stopped or words["stopped"]
            name, rank, world = f"group-{words['group']}", words["rank"], words["world"]
            try:
                join_group(
                    self._store,
                    rank=rank,
                    world=world,
                    name=name,
                    timeout_seconds=self._timeout_seconds,
                    called=lambda: self.called,
                )
            except RuntimeError:  # one of them died on its way: with those who are left
                continue
            return

    def leave(self) -> None:
        """Be in no group, and go on alone."""
        self._line.tell(left=True)

    def again(self) -> bool:
        """Always: the supervisor replaces who is lost."""
        return True

    def _listen(self) -> None:
        while said := self._line.hear():
            for words in said:
                if "go" in words:
                    self.called = False  # here, in the order of what was said: another call may come right behind
                    self._sent_off.put(words)
                elif "stop" in words and self._stops_alone:
                    os.kill(os.getpid(), signal.SIGINT)
                    self._sent_off.put({"stopped": True})  # out of the wait for the others
                elif "stop" in words:
                    self.called = self.stopped = True
                elif "called" in words:
                    self.called = True
        os._exit(1)  # also out of an exchange that would wait for its time-out


def _team(line: Line, plan: dict[str, Any]) -> Team:
    strategy, timeout_seconds = Strategy(**plan["strategy"]), plan["timeout_seconds"]
    if not strategy.served:
        rendezvous = Supervised(line, store=plan["store"], timeout_seconds=timeout_seconds)
        return Together(rendezvous, member=plan["member"], strategy=strategy)
    ticket = Ticket(**{**plan["ticket"], "addresses": tuple(plan["ticket"]["addresses"])})
    options: dict[str, Any] = {"world": plan["workers"], "strategy": strategy, "timeout_seconds": timeout_seconds}
    rendezvous = Supervised(line, store=plan["store"], timeout_seconds=timeout_seconds, stops_alone=True)
    if strategy.strategy == "wasap":
        return Merging(rendezvous, ticket=ticket, **options)
    return Apart(ticket, **options)


def work(descriptor: int, recipe: Callable[[dict[str, Any]], None]) -> int:
    """Be the worker at the other end of this socket.

    Args:
        descriptor: of the socket.
        recipe: trains as the supervisor's plan says, once this process is a member of its team.
    """
    line = Line(socket.socket(fileno=descriptor))
    said = line.hear()
    if not said:
        return 1
    plan = said[0]
    torch.set_num_threads(plan["threads"])
    with as_member_of(_team(line, plan)) as team:
        team.one_machine = True
        try:
            recipe(plan)
            if not team.trained and plan["workers"] > 1:
                raise UsageError(UNTRAINED)
        except KeyboardInterrupt:
            line.tell(done=True)
            return 130
        except Exception as error:  # whatever it is, the supervisor says it
            kind = "" if isinstance(error, NoctuleError) else f"{type(error).__name__}: "
            line.tell(failed=f"{kind}{error}")
            raise
    line.tell(done=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0
