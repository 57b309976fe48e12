"""Where a shard's messages are read, checked and answered, at once or when the worker's turn has come; without sockets."""

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
from noctule.transport.messages import field, read, to_bytes, to_tensor, write

_RETRY_SECONDS = 5.0
"""From a snapshot that failed to the next attempt."""

Letter = tuple[bytes, list[bytes]]
"""The route to a worker, and the frames of an answer to it."""


class Desk:
    """Answers messages; whatever one says, the shard stays as it is or makes exactly one step.

    A worker has one request under way; a later one takes its place. A push that was seen already is answered again and not applied
    again. One that does not follow the last is answered with ``lost``: its sender must join again and send what is missing.

    Args:
        shard: what the messages are for.
        codec: how gradients are encoded.
        folder: where snapshots are kept, from which this shard goes on if there is one; None for none.
        snapshot_every: how many pushes lie between two of them.
        max_bytes: of the tensors of one message.
    """

    waiting = False
    """Whether time alone brings an answer soon; here others' words do."""

    def __init__(
        self,
        shard: Shard,
        *,
        codec: Codec | None = None,
        folder: str | os.PathLike | None = None,
        snapshot_every: int = 100,
        max_bytes: int = 1 << 30,
    ) -> None:
        """Take up the newest snapshot."""
        if snapshot_every < 1:
            raise ValueError(f"a snapshot is made after at least one push, got snapshot_every={snapshot_every}")
        self.shard, self.codec, self.max_bytes = shard, Exact() if codec is None else codec, max_bytes
        self.snapshot_every = snapshot_every
        self.checkpoints = None if folder is None else Checkpoints(folder)
        self._waiting: dict[int, tuple[bytes, dict[str, Any], list[bytes]]] = {}
        if self.checkpoints is not None and (found := self.checkpoints.latest()) is not None:
            shard.load_state_dict(found[1])
        self._unsaved = 0
        self._owing: float | None = None  # when to try a snapshot that failed again: who has left sends nothing again

    def handle(self, worker: int, route: bytes, frames: Sequence[bytes]) -> list[Letter]:
        """What is to be sent, to this worker and to others whose turn has come."""
        header: dict[str, Any] = {}
        try:
            header, tensors = read(frames)
            kind, serial = field(header, "kind", str), field(header, "serial", int)
            self.shard.hears(worker, field(header, "session", str))
            if kind == "ask":
                return [(route, write({"serial": serial, **self._told(worker, route, header)}))]
            if sum(map(len, tensors)) > self.max_bytes:
                raise ExchangeError(
                    f"a message holds at most {self.max_bytes:,} bytes of tensors, got {sum(map(len, tensors)):,}: use more "
                    "shards, or a server with a larger max_bytes"
                )
            if kind not in self._KINDS:
                raise ExchangeError(f"there is no request {kind!r:.40}: one of {', '.join(self._KINDS)}, ask")
        except Exception as error:  # a message never ends the server
            return [(route, write({"serial": _number(header), "error": _said(error)}))]
        self._waiting[worker] = (route, header, tensors)
        return self._settle()

    def tick(self) -> list[Letter]:
        """Time has passed: whoever fell silent is not waited for, and a snapshot that failed is tried again."""
        self.shard.forget_silent()
        if self._owing is not None and self.shard.now() >= self._owing:
            self._save()
        return self._settle()

    def close(self) -> None:
        """Keep everything."""
        if self._unsaved or self._owing is not None:
            self._save()

    def _told(self, worker: int, route: bytes, asked: dict[str, Any]) -> dict[str, Any]:
        """Whether a request is here, and what it waits for; its answer will go where the question came from."""
        _, header, tensors = self._waiting.get(worker, (b"", {}, []))
        if (header.get("session"), header.get("serial")) != (asked["session"], field(asked, "about", int)):
            return {"waiting": False}
        self._waiting[worker] = (route, header, tensors)
        return {"waiting": True, "why": self.shard.why_not(worker)}

    def _settle(self) -> list[Letter]:
        """Answer whoever can be answered, until that changes nothing for the others."""
        letters, moved = [], True
        while moved:
            moved = False
            for worker, (route, header, tensors) in list(self._waiting.items()):
                version = self._standing()
                try:
                    answer = self._KINDS[header["kind"]](self, worker, header, tensors)
                except Exception as error:  # nor does what a message asks for
                    answer = {"error": _said(error)}, []
                moved = moved or self._standing() != version
                if answer is not None:
                    del self._waiting[worker]
                    letters.append((route, write({"serial": header["serial"], **answer[0]}, answer[1])))
        if self._unsaved >= self.snapshot_every:
            self._save()
        return letters

    def _standing(self) -> tuple[object, ...]:
        """What others may be waiting for."""
        shard = self.shard
        return len(shard.parameters), *((n, seat.clock, seat.live) for n, seat in shard.seats.items())

    # The requests: a header and frames, or None as long as there is no answer.

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
        return {"seed": False, "limit": self.max_bytes, "seen": self.shard.seats[worker].seen}, []

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
        if not shard.knows(worker, header["session"]) or number > shard.seats[worker].seen + 1:
            return {"lost": True}, []
        seat = shard.seats[worker]
        if number > seat.seen:
            if not shard.may_run(worker):
                return None
            shard.push(worker, number, self._gradients(names, tensors), versions)
            self._unsaved += 1
        if not shard.may_run(worker):
            return None
        said, weights = self._weights(worker, versions) if pull else ({}, [])
        return {**said, "version": shard.version, "staleness": seat.staleness, "saved": self._safe(worker)}, weights

    def _move(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        shard, number, versions = self.shard, field(header, "number", int), self._versions(header)
        if worker != 0:
            raise ExchangeError(f"connections are moved by worker 0, and this is worker {worker}")
        if not shard.knows(worker, header["session"]) or number > shard.seats[worker].seen + 1:
            return {"lost": True}, []
        if number > shard.seats[worker].seen:
            shard.move(worker, number, self._moves(field(header, "names", list), versions, tensors))
            self._save()  # others will have seen it: a shard that comes back must not be behind them
        return {"saved": self._safe(worker)}, []

    def _pull(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        key, versions = field(header, "kept", str, default=""), self._versions(header)
        if not self.shard.knows(worker, header["session"]):
            return {"lost": True}, []
        if not self.shard.may_run(worker):
            return None
        said, frames = self._weights(worker, versions)
        assert self.shard.weights is not None
        kept = self.shard.weights.kept(key)
        frames += [to_bytes(Exact().encode(x.float())) for x in kept.values()]
        return {**said, "kept": list(kept), "version": self.shard.version, "saved": self._safe(worker)}, frames

    def _leave(self, worker: int, header: dict[str, Any], tensors: list[bytes]) -> Any:
        number = field(header, "number", int)
        if not self.shard.knows(worker, header["session"]) or number > self.shard.seats[worker].seen:
            return {"lost": True}, []
        self.shard.leave(worker)
        if self._safe(worker) < number:
            self._save()  # the worker does not keep its pushes any longer
        return {"saved": self._safe(worker)}, []

    _KINDS = {"join": _join, "seed": _seed, "push": _push, "move": _move, "pull": _pull, "leave": _leave}  # noqa: RUF012 nobody changes it

    # Inside.

    def _gradients(self, names: list[Any], tensors: list[bytes]) -> dict[str, Any]:
        parameters = self.shard.parameters
        strange = [name for name in names if not isinstance(name, str) or name not in parameters]
        if strange or len(set(names)) != len(names):
            raise ExchangeError(
                f"this shard keeps {list(parameters)!r:.300}, and a push is of {strange or names!r:.300}: does the worker deal its "
                "parameters to as many shards?"
            )
        if len(names) != len(tensors):
            raise ExchangeError(f"a push of {len(names)} gradients came with {len(tensors)} frames: it is torn")
        return {n: to_tensor(self.codec, x, parameters[n].shape, n) for n, x in zip(names, tensors, strict=True)}

    def _moves(self, names: list[Any], versions: dict[str, int], tensors: list[bytes]) -> dict[str, Any]:
        """What moves in which layer, and the first values of what comes."""
        if len(set(names)) != len(names) or 3 * len(names) != len(tensors):
            raise ExchangeError(f"a move of {len(names)} layers came with {len(tensors)} frames: it is torn")
        found = {}
        for place, name in enumerate(names):
            ledger = self.shard.ledgers.get(name)
            if ledger is None or versions[name] != ledger.version:
                raise ExchangeError(
                    f"worker 0 moves connections of version {versions.get(name)} of {name!r:.100}, where this shard has "
                    f"{'none' if ledger is None else ledger.version}: begin again from a checkpoint"
                )
            dropped, grown, values = tensors[3 * place : 3 * place + 3]
            move = Move.read([dropped, grown], ledger.topology)
            found[name] = move, to_tensor(Exact(), values, move.grown.shape, name)
        return found

    def _versions(self, header: dict[str, Any]) -> dict[str, int]:
        """Of the connections that a worker has, for every layer of this shard."""
        versions = field(header, "versions", dict, default={})
        for name in self.shard.ledgers:
            if type(versions.get(name)) is not int:
                raise ExchangeError(f"a message must say which version of the connections of {name!r} its sender has")
        return versions

    def _weights(self, worker: int, versions: dict[str, int]) -> tuple[dict[str, Any], list[bytes]]:
        """The weights, then what their connections are, where the worker does not know it."""
        frames = [to_bytes(Exact().encode(x)) for x in self.shard.pull(worker).values()]
        places: list[tuple[str, int, int | None]] = []
        for name, ledger in self.shard.ledgers.items():
            moves, topology = ledger.missed(versions[name]), ledger.topology
            if moves is None:
                frames.append(to_frame(topology.keys(), topology.places))
                places.append((name, ledger.version, None))
            elif moves:
                frames += [frame for move in moves for frame in move.write(topology)]
                places.append((name, ledger.version, len(moves)))
        return {"places": places}, frames

    def _safe(self, worker: int) -> int:
        """The last push of this worker that need not be kept for being sent again."""
        seat = self.shard.seats[worker]
        return seat.seen if self.checkpoints is None else seat.saved

    def _save(self) -> None:
        self._unsaved, self._owing = 0, None
        if self.checkpoints is not None:
            try:
                self.shard.save(self.checkpoints)
            except CheckpointError as error:  # workers keep their pushes until it succeeds
                self._owing = self.shard.now() + _RETRY_SECONDS
                warnings.warn(f"{error}; the shard goes on, and tries again in {_RETRY_SECONDS:g} s", stacklevel=2)


def _topology(frame: bytes, shape: list[int], weights: Any, name: str) -> Topology:
    """The first places of a sparse layer's values."""
    if len(shape) != 2 or max(shape) > MOST_FEATURES:
        raise ExchangeError(f"{name!r:.100} cannot have the places of a matrix of shape {shape}")
    keys = from_frame(frame, shape[0] * shape[1])
    if weights != [keys.numel()]:
        raise ExchangeError(f"{name!r:.100} has {keys.numel()} places, and the shape {weights!r:.100}")
    return Topology.from_keys((shape[0], shape[1]), keys)


def _said(error: Exception) -> str:
    """What its sender hears; also of an error that nobody foresaw, as of an optimizer: the others are to be served."""
    if isinstance(error, ExchangeError):
        return str(error)
    return f"the shard failed at this request: {type(error).__name__}: {error}"


def _number(header: dict[str, Any]) -> int:
    serial = header.get("serial")
    return serial if type(serial) is int else -1
