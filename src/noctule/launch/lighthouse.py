"""Workers on any machines, each started there, which find each other through a lighthouse of torchft.

    torchft_lighthouse --min_replicas 2 --join_timeout_ms 1000 --heartbeat_timeout_ms 2000
    noctule run sparse_mlp --lighthouse first-machine:29510 --member 0 --out runs/together

Only torchft's quorum is used. Beside its training each worker asks the lighthouse again and again for the quorum, the list of
living workers, and reports whether it waits for a group. All members of a quorum get the same list. If all of them wait, they form
the next group. If some wait, the others leave their group as soon as no step is half done. A silent worker is in no quorum.
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
"""The default port of torchft's lighthouse."""
_ASK_SECONDS = 0.25
_ANSWER_SECONDS = 3.0
"""The timeout of one request; a lighthouse without a quorum does not answer, and is asked again."""
_SURE = 3
"""The quorums in a row that must hold two workers of one number: a killed worker is in one more quorum at most."""
_TRIES = 10
"""The attempts to form one group, when workers are lost on their way to it."""
_SIOCGIFADDR = 0x8915


class Lighthouse:
    """How a worker finds the others through a lighthouse of torchft, within a ``with`` block.

    Ctrl-C stops the one worker that gets it; for the others it is lost.

    Args:
        address: of the lighthouse, as ``machine:port`` or ``http://machine:port``.
        member: the number of this worker, from 0 on: no two workers have the same.
        timeout_seconds: the silence after which a peer, or a lighthouse that is needed, is taken to be lost.

    Raises:
        UsageError: torchft is not installed, there is no lighthouse, or the network to use for the others is not clear.
    """

    stopped = False

    def __init__(self, address: str, *, member: int, timeout_seconds: float = 30.0) -> None:
        if member < 0:
            raise UsageError(f"workers are numbered from 0 on, got member={member}")
        self.address, self.member, self.timeout_seconds = address, member, timeout_seconds
        self.called = self.lost = False
        self._client, own = _reach(address)
        _use_network_of(own)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store = TCPStore(own, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self._store_address = f"{own}:{self._store.port}"
        self._name = f"{member:06}-{uuid.uuid4().hex[:12]}"
        """A name that is new in each process: a restarted worker is another one for the lighthouse."""
        self._groups: queue.SimpleQueue[Quorum] = queue.SimpleQueue()
        self._joining: set[str] = set()
        self._waiting = self._formed = False
        self._duplicates = 0
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        """Begin; the lighthouse is asked from the first group on, or the others would wait for a worker that makes its model."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the threads: one that is inside torchft when Python ends would abort the process."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def form(self) -> None:
        """Join the next group (see `noctule.team.group.Rendezvous`).

        Raises:
            ExchangeError: the lighthouse does not answer, or the workers do not reach one another.
            UsageError: another worker has this one's number.
        """
        self._start_threads()
        for left in reversed(range(_TRIES)):
            if dist.is_initialized():
                dist.destroy_process_group()
            self._waiting = True
            group = self._next()
            try:
                self._join(group)
            except (
                RuntimeError
            ) as error:  # a worker died on its way, or another one has come: again, with those that are there
                if not left:
                    raise ExchangeError(
                        f"the lighthouse at {self.address} sees other workers, but in {_TRIES} tries there was no group with "
                        f"them: {error}. Can their machines reach one another, at every port?"
                    ) from error
            else:
                self._formed = True
                return
            finally:
                self._joining = set()

    def again(self) -> bool:
        """True: a lost worker is not in the next quorum."""
        return True

    # Beside the training.

    def _start_threads(self) -> None:
        if self._threads:
            return
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._send_heartbeats, self._ask)]
        for thread in self._threads:
            thread.start()

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(_ASK_SECONDS):
            with suppress(RuntimeError, TimeoutError):  # away for now: `_next` looks for how long
                self._client.heartbeat(self._name, timedelta(seconds=_ANSWER_SECONDS))
                self._answered = time.monotonic()

    def _ask(self) -> None:
        patience = timedelta(seconds=_ANSWER_SECONDS)
        while not self._ended.wait(_ASK_SECONDS):
            report: dict[Hashable, object] = {"waits": self._waiting}
            with suppress(RuntimeError, TimeoutError):
                self._receive(self._client.quorum(self._name, patience, store_address=self._store_address, data=report))

    def _receive(self, quorum: "Quorum") -> None:
        """React to a quorum, alike on all its members."""
        names = [each.replica_id for each in quorum.participants]
        waiting = [bool(each.data and each.data.get("waits")) for each in quorum.participants]
        numbers = [name.partition("-")[0] for name in names]
        if len(set(numbers)) < len(numbers):
            self._duplicates += numbers.count(f"{self.member:06}") > 1
            return
        self._duplicates = 0
        if all(waiting):
            self._waiting = self.called = self.lost = False
            self._joining = set(names)
            self._groups.put(quorum)
        else:
            self.lost = not self._joining <= set(names)
            self.called = self.called or self.lost or any(waiting)

    # In the training.

    def _next(self) -> "Quorum":
        """The next quorum whose members all wait for a group."""
        since = time.monotonic()
        while True:
            with suppress(queue.Empty):
                return self._groups.get(timeout=_ASK_SECONDS)
            now = time.monotonic()
            if now - self._answered > self.timeout_seconds:
                raise ExchangeError(
                    f"the lighthouse at {self.address} has not answered for {now - self._answered:.0f} seconds, and without it "
                    f"there is no new group of workers. Start it again there (torchft_lighthouse), then give the same command "
                    f"again, which goes on from the last checkpoint"
                )
            if self._duplicates >= _SURE and not self._formed:
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
        """Join the group of a quorum; RuntimeError if it is not formed."""
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


def _use_network_of(own: str) -> None:
    """Have gloo use the network of this address; by default it uses the one of the host's name, which often is the loopback."""
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
