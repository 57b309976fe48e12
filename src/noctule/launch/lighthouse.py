"""Workers on any machines, each started by hand or by whatever starts it there, which meet at a lighthouse of torchft.

    torchft_lighthouse --min_replicas 2 --join_timeout_ms 1000 --heartbeat_timeout_ms 2000
    noctule run sparse_mlp --lighthouse first-machine:29510 --member 0 --out runs/together

Of torchft this takes the quorum alone. Each worker asks the lighthouse again and again, beside its training, who there are, and
says whether it waits for a group; all who are told of one quorum are told the same. Where all of them wait, they are the next
group; where some do, the others leave theirs as soon as no step is half done. A worker that is silent is in no quorum.
"""

import fcntl
import os
import queue
import socket
import struct
import threading
import time
import uuid
import warnings
from collections.abc import Hashable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from noctule.core.errors import ExchangeError, UsageError
from noctule.team.group import join_group

if TYPE_CHECKING:
    from torchft.coordination import LighthouseClient, Quorum  # pyright: ignore[reportMissingImports] it is optional

_PORT = 29510
"""Where torchft's lighthouse listens unless it is told otherwise."""
_ASK_SECONDS = 0.25
_ANSWER_SECONDS = 3.0
"""For another machine to answer; a lighthouse without a quorum does not, and is asked once more."""
_SURE = 3
"""Quorums in a row with two workers of one number: a killed one, of which the lighthouse does not know yet, is in one at most."""
_TRIES = 10
"""To form one group, when some are always lost on their way to it."""
_SIOCGIFADDR = 0x8915


class Lighthouse:
    """How a worker finds the others: as a lighthouse of torchft says, for as long as the block of its ``with`` lasts.

    Ctrl-C is for the one worker that gets it, which leaves the others as if it were lost.

    Args:
        address: of the lighthouse, as ``machine:port`` or ``http://machine:port``.
        member: which of the workers this is, for good, from 0 on: no two have the same number.
        timeout_seconds: after which a silent peer, or a lighthouse that is needed and does not answer, is taken to be lost.

    Raises:
        UsageError: torchft is not installed, there is no lighthouse, or the network to use for the others is not clear.
    """

    stopped = False

    def __init__(self, address: str, *, member: int, timeout_seconds: float = 30.0) -> None:
        """Reach it, and ask nothing yet."""
        if member < 0:
            raise UsageError(f"workers are numbered from 0 on, got member={member}")
        self.address, self.member, self.timeout_seconds = address, member, timeout_seconds
        self.called = self.lost = False
        self._client, own = _reach(address)
        _speak_from(own)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store = TCPStore(own, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self._store_address = f"{own}:{self._store.port}"
        self._name = f"{member:06}-{uuid.uuid4().hex[:12]}"
        """One that is started again is another one for the lighthouse."""
        self._groups: queue.SimpleQueue[Quorum] = queue.SimpleQueue()
        self._on_their_way: set[str] = set()
        self._waits = self._formed = False
        self._twins = 0
        self._left = threading.Event()
        self._speaking: list[threading.Thread] = []

    def __enter__(self) -> Self:
        """Nothing is asked before the first group: the others would wait for one who is still making its model."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Be silent: a thread that is inside of torchft when Python ends would abort the process."""
        self._left.set()
        for thread in self._speaking:
            thread.join()

    def form(self) -> None:
        """See `noctule.team.group.Rendezvous`.

        Raises:
            ExchangeError: the lighthouse does not answer, or the workers do not reach one another.
            UsageError: another worker has this one's number.
        """
        self._speak()
        for left in reversed(range(_TRIES)):
            if dist.is_initialized():
                dist.destroy_process_group()
            self._waits = True
            group = self._next()
            try:
                self._join(group)
            except (
                RuntimeError
            ) as error:  # one of them died on its way, or another one has come: with those who are there then
                if not left:
                    raise ExchangeError(
                        f"the lighthouse at {self.address} sees other workers, but in {_TRIES} tries there was no group with "
                        f"them: {error}. Can their machines reach one another, at every port?"
                    ) from error
            else:
                self._formed = True
                return
            finally:
                self._on_their_way = set()

    def again(self) -> bool:
        """Always: whoever is lost is in the next quorum no more."""
        return True

    # Beside the training.

    def _speak(self) -> None:
        if self._speaking:
            return
        self._heard = time.monotonic()
        self._speaking = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._ask)]
        for thread in self._speaking:
            thread.start()

    def _beat(self) -> None:
        while not self._left.wait(_ASK_SECONDS):
            with suppress(RuntimeError, TimeoutError):  # away for now: who needs it looks for how long
                self._client.heartbeat(self._name, timedelta(seconds=_ANSWER_SECONDS))
                self._heard = time.monotonic()

    def _ask(self) -> None:
        patience = timedelta(seconds=_ANSWER_SECONDS)
        while not self._left.wait(_ASK_SECONDS):
            says: dict[Hashable, object] = {"waits": self._waits}
            with suppress(RuntimeError, TimeoutError):
                self._hear(self._client.quorum(self._name, patience, store_address=self._store_address, data=says))

    def _hear(self, quorum: "Quorum") -> None:
        """What a quorum means is the same for all who are in it."""
        names = [each.replica_id for each in quorum.participants]
        waiting = [bool(each.data and each.data.get("waits")) for each in quorum.participants]
        numbers = [name.partition("-")[0] for name in names]
        if len(set(numbers)) < len(numbers):
            self._twins += numbers.count(f"{self.member:06}") > 1
            return
        self._twins = 0
        if all(waiting):
            self._waits = self.called = self.lost = False
            self._on_their_way = set(names)
            self._groups.put(quorum)
        else:
            self.lost = not self._on_their_way <= set(names)
            self.called = self.called or self.lost or any(waiting)

    # In the training.

    def _next(self) -> "Quorum":
        """The next quorum of which all wait."""
        since = time.monotonic()
        while True:
            with suppress(queue.Empty):
                return self._groups.get(timeout=_ASK_SECONDS)
            now = time.monotonic()
            if now - self._heard > self.timeout_seconds:
                raise ExchangeError(
                    f"the lighthouse at {self.address} has not answered for {now - self._heard:.0f} seconds, and without it "
                    f"there is no new group of workers. Start it again there (torchft_lighthouse), then give the same command "
                    f"again, which goes on from the last checkpoint"
                )
            if self._twins >= _SURE and not self._formed:
                raise UsageError(
                    f"there is a worker {self.member} at the lighthouse at {self.address} already: give each a --member of "
                    f"its own"
                )
            if now - since > self.timeout_seconds:
                warnings.warn(
                    f"waiting for other workers: the lighthouse at {self.address} forms no quorum yet (it was told by "
                    f"--min_replicas how many there have to be)",
                    stacklevel=2,
                )

    def _join(self, quorum: "Quorum") -> None:
        """Be in the group that a quorum is; RuntimeError where it does not come about."""
        members = quorum.participants
        rank = [each.replica_id for each in members].index(self._name)
        name = f"group-{quorum.created.seconds}.{quorum.created.nanos:09}"  # its number is the same if its members are
        store = self._store
        if rank:
            host, _, port = members[0].store_address.rpartition(":")
            store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_ANSWER_SECONDS))
            store.set_timeout(self._timeout)
        join_group(
            store,
            rank=rank,
            world=len(members),
            name=name,
            timeout_seconds=self.timeout_seconds,
            called=lambda: self.called,
        )


def _reach(address: str) -> "tuple[LighthouseClient, str]":
    """A client of the lighthouse at an address, and the address that this machine has on the way there."""
    try:
        from torchft.coordination import LighthouseClient  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"a lighthouse needs torchft: pip install 'noctule[fault-tolerance]' (torchft-nightly): {error}"
        ) from error
    url = urlsplit(address if "//" in address else f"http://{address}")
    try:
        host, port = url.hostname or "", url.port or _PORT
    except ValueError as error:
        raise UsageError(f"a lighthouse is at machine:port, got {address}: {error}") from error
    try:
        found = socket.gethostbyname(host)  # version 4, as are the interfaces' addresses below
        with socket.create_connection((found, port), _ANSWER_SECONDS) as there:
            own = there.getsockname()[0]
        return LighthouseClient(f"http://{found}:{port}", timedelta(seconds=_ANSWER_SECONDS)), own
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"there is no lighthouse at {host}:{port} ({error}): start one there with `torchft_lighthouse --min_replicas 2 "
            f"--join_timeout_ms 1000 --heartbeat_timeout_ms 2000`, or say where it is"
        ) from error


def _speak_from(own: str) -> None:
    """Have gloo use the network of this address; by itself it takes that of the host's name, which often is the loopback."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == own:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return
    raise UsageError(
        f"no network interface with the address {own} was found: say by GLOO_SOCKET_IFNAME which one leads to the others"
    )
