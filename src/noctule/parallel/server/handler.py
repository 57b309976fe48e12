"""The handler of a shard: reads, checks and answers the requests of workers, at once or when they may run; without sockets."""

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

from noctule.checkpoint import Checkpoints
from noctule.codecs import Codec
from noctule.core.errors import CheckpointError, ExchangeError
from noctule.core.exact import Exact
from noctule.core.topology import MOST_FEATURES, Topology
from noctule.parallel.server.moves import Move, from_frame, to_frame
from noctule.parallel.server.shard import Shard
from noctule.transport.handler import Reply
from noctule.transport.messages import field, read, to_bytes, to_tensor, write

_RETRY_SECONDS = 5.0
"""The time from a snapshot that failed to the next attempt."""


class ShardHandler:
    """Answers the requests of workers to a shard; a request changes the shard completely or not at all.

    A worker has one pending request; a later one replaces it. A push that was applied already is answered and not applied again. A
    push whose number does not follow the last one is answered with ``lost``: the worker must join again and send what is missing.

    Args:
        shard: what the requests read and change.
        codec: how gradients are encoded.
        folder: where snapshots are kept; the shard continues from the newest one. None for no snapshots.
        snapshot_every: the number of pushes from one snapshot to the next.
        max_bytes: the largest size of the tensors of a message.
    """

    busy = False
    """Never in need of more frequent ticks: requests wait for other workers, not for time to pass."""

    def __init__(
        self,
        shard: Shard,
        *,
        codec: Codec | None = None,
        folder: str | os.PathLike | None = None,
        snapshot_every: int = 100,
        max_bytes: int = 1 << 30,
    ) -> None:
        if snapshot_every < 1:
            raise ValueError(f"a snapshot is made after at least one push, got snapshot_every={snapshot_every}")
        self.shard, self.codec, self.max_bytes = shard, Exact() if codec is None else codec, max_bytes
        self.snapshot_every = snapshot_every
        self.checkpoints = None if folder is None else Checkpoints(folder)
        self._pending: dict[int, tuple[bytes, dict[str, Any], list[bytes]]] = {}
        """Requests without a reply, by worker: the route, the header and the tensors."""
        if self.checkpoints is not None and (found := self.checkpoints.latest()) is not None:
            shard.load_state_dict(found[1])
        self._unsaved = 0
        self._retry_at: float | None = (
            None  # of a snapshot that failed: a worker that has left does not send its pushes again
        )

    def handle(self, worker: int, route: bytes, frames: Sequence[bytes]) -> list[Reply]:
        """Take a request; the replies that can be sent now, to this worker and to others that waited."""
        header: dict[str, Any] = {}
        try:
            header, tensors = read(frames)
            kind, serial = field(header, "kind", str), field(header, "serial", int)
            self.shard.note_message(worker, field(header, "session", str))
            if kind == "ask":
                return [Reply(route, write({"serial": serial, **self._status(worker, route, header)}))]
            if sum(map(len, tensors)) > self.max_bytes:
                raise ExchangeError(
                    f"a message holds at most {self.max_bytes:,} bytes of tensors, got {sum(map(len, tensors)):,}: use more "
                    "shards, or a server with a larger max_bytes"
                )
            if kind not in self._KINDS:
                raise ExchangeError(f"there is no request {kind!r:.40}: one of {', '.join(self._KINDS)}, ask")
        except Exception as error:  # a message never ends the server
            return [Reply(route, write({"serial": _serial(header), "error": _message(error)}))]
        self._pending[worker] = (route, header, tensors)
        return self._answer_pending()

    def tick(self) -> list[Reply]:
        """Mark silent workers as gone, and retry a snapshot that failed; the replies that can be sent now."""
        self.shard.forget_silent()
        if self._retry_at is not None and self.shard.now() >= self._retry_at:
            self._save()
        return self._answer_pending()

    def close(self) -> None:
        """Write a last snapshot, if there is anything new."""
        if self._unsaved or self._retry_at is not None:
            self._save()

    def _status(self, worker: int, route: bytes, asked: dict[str, Any]) -> dict[str, Any]:
        """Whether a request is pending, and why; its reply will be sent to the route of this question."""
        _, header, tensors = self._pending.get(worker, (b"", {}, []))
        if (header.get("session"), header.get("serial")) != (asked["session"], field(asked, "about", int)):
            return {"waiting": False}
        self._pending[worker] = (route, header, tensors)
        return {"waiting": True, "why": self.shard.why_not(worker)}

    def _answer_pending(self) -> list[Reply]:
        """Answer all pending requests that can be answered; again, as long as an answer lets other workers run."""
        replies, changed = [], True
        while changed:
            changed = False
            for worker, (route, header, tensors) in list(self._pending.items()):
                before = self._progress()
                try:
                    answer = self._KINDS[header["kind"]](self, worker, header, tensors)
                except Exception as error:  # nor does what a message asks for
                    answer = {"error": _message(error)}, []
                changed = changed or self._progress() != before
                if answer is not None:
                    del self._pending[worker]
                    replies.append(Reply(route, write({"serial": header["serial"], **answer[0]}, answer[1])))
        if self._unsaved >= self.snapshot_every:
            self._save()
        return replies

    def _progress(self) -> tuple[object, ...]:
        """The part of the shard's state that pending requests may wait for."""
        shard = self.shard
        return len(shard.parameters), *((n, state.clock, state.live) for n, state in shard.states.items())

    # Requests: each returns the header and frames of a reply, or None while it has to wait.

    def _join(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        facts = field(header, "facts", dict)
        if facts.get("codec") != str(self.codec):
            raise ExchangeError(
                f"worker {worker} differs from the server in 'codec': {facts.get('codec')!r:.200}, where it has "
                f"{str(self.codec)!r}: give both the same one"
            )
        if not self.shard.parameters and worker == 0:
            return {"seed": True, "limit": self.max_bytes}, []
        if not self.shard.join(worker, header["session"], facts):
            return None
        return {"seed": False, "limit": self.max_bytes, "seen": self.shard.states[worker].seen}, []

    def _seed(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        shapes, facts = field(header, "shapes", dict), field(header, "facts", dict)
        matrices = field(header, "places", dict, default={})
        bound, warm = field(header, "bound", int, default=None), field(header, "warm_start", int)
        if worker != 0:
            raise ExchangeError(f"the first weights come from worker 0, and this is worker {worker}")
        if warm < 0 or (bound is not None and bound < 0):
            raise ExchangeError(f"a bound and a warm start are numbers of pushes, got {bound} and {warm}")
        if not shapes or len(shapes) + len(matrices) != len(tensors):
            raise ExchangeError(f"{len(tensors)} tensors came for {len(shapes)} parameters")
        for name, shape in [*shapes.items(), *matrices.items()]:
            if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
                raise ExchangeError(f"{name!r:.100} cannot have the shape {shape!r:.100}")
        for name, shape in shapes.items():
            if 4 * math.prod(shape) > self.max_bytes:
                raise ExchangeError(f"{name!r:.100} of shape {shape} is more than {self.max_bytes:,} bytes")
        if not self.shard.parameters:
            first, rest = tensors[: len(shapes)], tensors[len(shapes) :]
            weights = {n: to_tensor(Exact(), x, shapes[n], n) for n, x in zip(shapes, first, strict=True)}
            places = {n: _topology(x, matrices[n], shapes.get(n), n) for n, x in zip(matrices, rest, strict=True)}
            self.shard.seed(weights, facts=facts, bound=bound, warm_start=warm, places=places)
            self._save()
        return {}, []

    def _push(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        shard, number = self.shard, field(header, "number", int)
        pull, names, versions = field(header, "pull", bool), field(header, "names", list), self._versions(header)
        if not shard.knows(worker, header["session"]) or number > shard.states[worker].seen + 1:
            return {"lost": True}, []
        state = shard.states[worker]
        if number > state.seen:
            if not shard.may_run(worker):
                return None
            shard.push(worker, number, self._gradients(names, tensors), versions)
            self._unsaved += 1
        if not shard.may_run(worker):
            return None
        places, weights = self._weights(worker, versions) if pull else ({}, [])
        return {**places, "version": shard.version, "staleness": state.staleness, "saved": self._safe(worker)}, weights

    def _move(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        shard, number, versions = self.shard, field(header, "number", int), self._versions(header)
        if worker != 0:
            raise ExchangeError(f"connections are moved by worker 0, and this is worker {worker}")
        if not shard.knows(worker, header["session"]) or number > shard.states[worker].seen + 1:
            return {"lost": True}, []
        if number > shard.states[worker].seen:
            shard.move(worker, number, self._moves(field(header, "names", list), versions, tensors))
            self._save()  # workers will have seen it: a shard that restarts must not be behind them
        return {"saved": self._safe(worker)}, []

    def _pull(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        key, versions = field(header, "kept", str, default=""), self._versions(header)
        if not self.shard.knows(worker, header["session"]):
            return {"lost": True}, []
        if not self.shard.may_run(worker):
            return None
        places, frames = self._weights(worker, versions)
        assert self.shard.weights is not None
        kept = self.shard.weights.kept(key)
        frames += [to_bytes(Exact().encode(x.float())) for x in kept.values()]
        return {**places, "kept": list(kept), "version": self.shard.version, "saved": self._safe(worker)}, frames

    def _leave(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        number = field(header, "number", int)
        if not self.shard.knows(worker, header["session"]) or number > self.shard.states[worker].seen:
            return {"lost": True}, []
        self.shard.leave(worker)
        if self._safe(worker) < number:
            self._save()  # the worker does not keep its pushes any longer
        return {"saved": self._safe(worker)}, []

    _KINDS = {"join": _join, "seed": _seed, "push": _push, "move": _move, "pull": _pull, "leave": _leave}  # noqa: RUF012 it is not changed

    # Inside.

    def _gradients(self, names: list[Any], tensors: list[bytes]) -> dict[str, Any]:
        parameters = self.shard.parameters
        strange = [name for name in names if not isinstance(name, str) or name not in parameters]
        if strange or len(set(names)) != len(names):
            raise ExchangeError(
                f"this shard keeps {list(parameters)!r:.300}, and a push is of {strange or names!r:.300}: does the worker assign "
                "its parameters to as many shards?"
            )
        if len(names) != len(tensors):
            raise ExchangeError(f"a push of {len(names)} gradients came with {len(tensors)} frames: it is incomplete")
        return {n: to_tensor(self.codec, x, parameters[n].shape, n) for n, x in zip(names, tensors, strict=True)}

    def _moves(self, names: list[Any], versions: dict[str, int], tensors: list[bytes]) -> dict[str, Any]:
        """For each layer its move, and the initial values of the new connections."""
        if len(set(names)) != len(names) or 3 * len(names) != len(tensors):
            raise ExchangeError(f"a move of {len(names)} layers came with {len(tensors)} frames: it is incomplete")
        found = {}
        for place, name in enumerate(names):
            log = self.shard.logs.get(name)
            if log is None or versions[name] != log.version:
                raise ExchangeError(
                    f"worker 0 moves connections of version {versions.get(name)} of {name!r:.100}, where this shard has "
                    f"{'none' if log is None else log.version}: begin again from a checkpoint"
                )
            dropped, grown, values = tensors[3 * place : 3 * place + 3]
            move = Move.read([dropped, grown], log.topology)
            found[name] = move, to_tensor(Exact(), values, move.grown.shape, name)
        return found

    def _versions(self, header: dict[str, Any]) -> dict[str, int]:
        """The version of the topology that a worker has, for every sparse layer of this shard."""
        versions = field(header, "versions", dict, default={})
        for name in self.shard.logs:
            if type(versions.get(name)) is not int:
                raise ExchangeError(f"a message must say which version of the connections of {name!r} its sender has")
        return versions

    def _weights(self, worker: int, versions: dict[str, int]) -> tuple[dict[str, Any], list[bytes]]:
        """The weights, and the moves or the topologies of the layers whose newest version the worker does not have."""
        frames = [to_bytes(Exact().encode(x)) for x in self.shard.pull(worker).values()]
        places: list[tuple[str, int, int | None]] = []
        for name, log in self.shard.logs.items():
            moves, topology = log.missed(versions[name]), log.topology
            if moves is None:
                frames.append(to_frame(topology.keys(), topology.places))
                places.append((name, log.version, None))
            elif moves:
                frames += [frame for move in moves for frame in move.write(topology)]
                places.append((name, log.version, len(moves)))
        return {"places": places}, frames

    def _safe(self, worker: int) -> int:
        """The number of the last push that the worker need not keep for a restart of this shard."""
        state = self.shard.states[worker]
        return state.seen if self.checkpoints is None else state.saved

    def _save(self) -> None:
        self._unsaved, self._retry_at = 0, None
        if self.checkpoints is not None:
            try:
                self.shard.save(self.checkpoints)
            except CheckpointError as error:  # workers keep their pushes until it succeeds
                self._retry_at = self.shard.now() + _RETRY_SECONDS
                warnings.warn(f"{error}; the shard continues, and tries again in {_RETRY_SECONDS:g} s", stacklevel=2)


def _topology(frame: bytes, shape: list[int], weights: Any, name: str) -> Topology:
    """Read the initial topology of a sparse layer."""
    if len(shape) != 2 or max(shape) > MOST_FEATURES:
        raise ExchangeError(f"{name!r:.100} cannot have the places of a matrix of shape {shape}")
    keys = from_frame(frame, shape[0] * shape[1])
    if weights != [keys.numel()]:
        raise ExchangeError(f"{name!r:.100} has {keys.numel()} places, and the shape {weights!r:.100}")
    return Topology.from_keys((shape[0], shape[1]), keys)


def _message(error: Exception) -> str:
    """The text for the worker; unexpected errors, as of an optimizer, have one too, since other workers are still served."""
    if isinstance(error, ExchangeError):
        return str(error)
    return f"the shard failed at this request: {type(error).__name__}: {error}"


def _serial(header: dict[str, Any]) -> int:
    serial = header.get("serial")
    return serial if type(serial) is int else -1
