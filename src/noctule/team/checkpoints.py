"""Checkpoints of several workers: all go on from whoever has come furthest, whether it lives or has left a file."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from noctule.checkpoint import Checkpoints, load, save
from noctule.core.errors import LostWorkerError
from noctule.exchange import Group
from noctule.team.strategy import Strategy


class Sharing(Protocol):
    """The team whose checkpoints are compared."""

    strategy: Strategy
    broken: bool
    """Whether a worker was lost, so that the group has to be formed anew."""

    def obey(self) -> None:
        """Stop here if the training is to stop."""
        ...


class SharedCheckpoints(Checkpoints):
    """A worker's own checkpoints, which compares itself with the others' before it goes on from one.

    Args:
        own: where this worker's files are.
        team: between whom.
        steps: of the whole training: who has done them all needs nobody.
    """

    def __init__(self, own: Checkpoints, team: Sharing, *, steps: int) -> None:
        """Nothing is read yet."""
        super().__init__(own.folder, keep=own.keep)
        self._team, self._steps = team, steps
        self._held: tuple[int, Any] | None = None

    def save(self, step: int, state: Any) -> Path:
        """Write it; where the group was just lost, keep it here instead, since the training is about to go on."""
        if self._team.broken:
            self._held = step, state
            return self.path(step)
        return super().save(step, state)

    def latest(self) -> tuple[int, Any] | None:
        """The state of the worker that has come furthest, and this one's own where that is as far.

        Raises:
            LostWorkerError: another worker is lost meanwhile.
        """
        mine, self._held = self._held or super().latest(), None
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
        said = [json.loads(each) for each in group.share(json.dumps([step, met, digest]).encode())]
        furthest = max(step for step, *_ in said)
        donor = max(range(len(said)), key=lambda rank: (*said[rank][:2], -rank))
        if furthest < 0 or all(each == said[donor] for each in said):
            return mine
        sent = _to_bytes(mine[1], self.folder) if mine is not None and group.rank == donor else b""
        received = _broadcast(group, sent, donor)
        if [step, met, digest] == said[donor]:
            return mine
        state = _from_bytes(received, self.folder)
        state["random"] = torch.get_rng_state()  # its own draws, not the donor's once more
        return furthest, state


def _exchanges(tree: Any) -> int:
    """How many exchanges a session's state has seen finished: of two at the same step, one may have had its meeting already."""
    if isinstance(tree, Mapping):
        return int(tree["finished"]) if "finished" in tree else sum(map(_exchanges, tree.values()))
    return sum(map(_exchanges, tree)) if isinstance(tree, list) else 0


def _digest(model: Mapping[str, Any], *, numbers: bool) -> str:
    """Of a model's places, and of its ``numbers`` where workers must have the same."""
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
    """A state as the bytes of its file: what is read is checked as a file is."""
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
