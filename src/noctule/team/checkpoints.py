"""Checkpoints of several workers: all resume from the state that is furthest, of a living worker or of a file."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.checkpoint import load, save
from noctule.core.errors import LostWorkerError
from noctule.exchange import Group
from noctule.team.strategy import GroupStrategy
from noctule.train.fit import SavedStates


class Sharing(Protocol):
    """The team between whose workers checkpoints are compared."""

    strategy: GroupStrategy
    broken: bool
    """Whether a worker was lost, so that the group has to be formed anew."""

    def obey(self) -> None:
        """Stop if the training is to stop."""
        ...


class SharedCheckpoints:
    """A worker's checkpoints, compared with those of the others before the training resumes from one.

    Args:
        own: this worker's.
        team: the workers.
        steps: of the whole training: a worker that has done all of them does not ask the others.
    """

    def __init__(self, own: SavedStates, team: Sharing, *, steps: int) -> None:
        self.folder = own.folder
        self._own, self._team, self._steps = own, team, steps
        self._held: tuple[int, Any] | None = None

    def save(self, step: int, state: Any) -> None:
        """Write a state; after the loss of the group keep it in memory instead, since the training is about to resume."""
        if self._team.broken:
            self._held = step, state
        else:
            self._own.save(step, state)

    def latest(self) -> tuple[int, Any] | None:
        """The state of the worker that is furthest; this worker's own where that is as far.

        Raises:
            LostWorkerError: a worker was lost meanwhile.
        """
        mine, self._held = self._held or self._own.latest(), None
        if mine is not None and mine[0] >= self._steps and not mine[1]["progress"]["batch"]:
            return mine
        try:
            found = self._furthest(mine)
        except LostWorkerError:
            self._held = mine
            raise
        self._team.obey()
        return found

    def _furthest(self, mine: tuple[int, Any] | None) -> tuple[int, Any] | None:
        group = Group()
        step = -1 if mine is None else mine[0]
        digest = "" if mine is None else _digest(mine[1]["model"], numbers=self._team.strategy.equal_weights)
        met = 0 if mine is None else _exchanges(mine[1]["session"])
        reports = [json.loads(each) for each in group.share(json.dumps([step, met, digest]).encode())]
        furthest = max(step for step, *_ in reports)
        donor = max(range(len(reports)), key=lambda rank: (*reports[rank][:2], -rank))
        if furthest < 0 or all(report == reports[donor] for report in reports):
            return mine
        sent = _to_bytes(mine[1], self.folder) if mine is not None and group.rank == donor else b""
        received = _broadcast(group, sent, donor)
        if [step, met, digest] == reports[donor]:
            return mine
        state = _from_bytes(received, self.folder)
        state["random"] = torch.get_rng_state()  # draws of its own, not the donor's once more
        return furthest, state


def _exchanges(tree: Any) -> int:
    """The exchanges finished in a session's state: of two workers at the same step, one may have had the meeting already."""
    if isinstance(tree, Mapping):
        return int(tree["finished"]) if "finished" in tree else sum(map(_exchanges, tree.values()))
    return sum(map(_exchanges, tree)) if isinstance(tree, list) else 0


def _digest(model: Mapping[str, Any], *, numbers: bool) -> str:
    """A digest of a model's places, and of its ``numbers`` where all workers must have the same."""
    found = hashlib.blake2b(digest_size=8)
    for x in _tensors(model):
        if numbers or not x.is_floating_point():
            found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for key in sorted(tree):
            yield from _tensors(tree[key])


def _to_bytes(state: Any, folder: Path) -> bytes:
    """A state as the bytes of its file, so that it is checked as a file is when it is read."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".handed-") as where:
        save(path := Path(where) / "state", state)
        return path.read_bytes()


def _from_bytes(content: bytes, folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".handed-") as where:
        (path := Path(where) / "state").write_bytes(content)
        return load(path)


def _broadcast(group: Group, content: bytes, donor: int) -> bytes:
    """The donor's bytes, at all workers."""
    try:
        size = torch.tensor([len(content)])
        dist.broadcast(size, donor)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if group.rank == donor:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(buffer, donor)
    except RuntimeError as error:
        raise LostWorkerError(
            f"worker {group.rank} could not take over the state of worker {donor}: {error}"
        ) from error
    return buffer.numpy().tobytes()
