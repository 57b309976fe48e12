"""Between workers: what each one has goes through stages onto the wire, and what they have together comes back.

An `Exchange` is what strategies and hooks call. `Channel` is the usual one: stages, a path between the workers, an aggregate.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from noctule.core.aggregate import Aggregate, mean
from noctule.core.codec import Codec
from noctule.core.errors import ExchangeError
from noctule.core.finite import all_finite
from noctule.core.remap import Remap


@dataclass(frozen=True)
class Work:
    """What one exchange takes a worker."""

    seconds: float
    """Of encoding and decoding, on this machine."""
    sent_bytes: float
    rounds: int
    """Messages that wait for one another."""


class Exchange(ABC):
    """What I have -> what everyone has; all workers call it with the same keys and shapes, in the same order."""

    at_once = False
    """Whether it takes rounds rather than bytes, so that all tensors should come in one call, not each as soon as it is there."""

    @abstractmethod
    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The aggregates; ``keys`` name the tensors for whatever is kept of them from one call to the next."""

    @abstractmethod
    def share(self, message: bytes) -> list[bytes]:
        """What every worker has to say, in their order: for words, not for tensors."""

    @property
    def counts(self) -> bool:
        """Whether what this worker gives now enters the aggregates: not where it has nothing, with a `Weigh` of zero."""
        return True

    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Work:
        """What an exchange of such tensors would take; nothing is sent and nothing kept."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say what it takes, so nothing can choose it by its price"
        )

    def release(self) -> dict[str, Tensor]:
        """Key -> what is owed, which whoever asks must send: nothing is owed here from now on."""
        return {}

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:  # noqa: B027 most keep nothing
        """The numbers of this key changed their places, and now have this shape: move what is kept for them."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 the same
        """Take back what `state_dict` gave."""


class Stage:
    """One layer of the wire: override what you need, by default everything passes unchanged."""

    needs_sum = False
    """It hides what single workers send, so only a sum of all makes sense."""
    codec: Codec | None = None
    """What turns the tensors into bytes; only the last stage may have one."""
    owes = False
    """It keeps what the others did not get, so the last stage hears what `arrived`."""
    scale = 1.0
    """By what the stages before it have multiplied, as the `Channel` says before `send`."""

    def weight(self) -> float:
        """How much this worker counts beside the others."""
        return 1.0

    def send(self, x: Tensor, key: str) -> Tensor:
        """What goes on instead of ``x``."""
        return x

    def arrived(self, sent: Tensor, delivered: Tensor, key: str) -> None:
        """Of what this stage sent, ``delivered`` is what the others made of it; not told where nobody takes any of it."""

    def close(self, total: Tensor, key: str, weight: float) -> Tensor:
        """What comes of the aggregate; ``weight`` is the mean of all workers' weights."""
        return total

    def release(self) -> dict[str, Tensor]:
        """Key -> what is owed, which whoever asks must send."""
        return {}

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """The numbers of this key changed their places, and now have this shape: move what is kept for them."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def __repr__(self) -> str:
        """What must be alike on all workers."""
        return type(self).__name__


@dataclass(frozen=True)
class Arrived:
    """What a path brings back."""

    totals: list[Tensor]
    """The aggregates."""
    delivered: list[Tensor]
    """Of each tensor of this worker, what has entered the aggregates."""
    numbers: list[float]
    """The sum, over all workers, of the numbers that came along."""


class Path(Protocol):
    """How messages get from every worker to every other."""

    rank: int
    world: int

    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        """Encode, send, receive, decode, aggregate; raises ExchangeError where a message is not what it must be."""
        ...

    def share(self, message: bytes) -> list[bytes]:
        """The messages of all workers, of any lengths, in their order."""
        ...

    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Work:
        """What an exchange of such tensors would take; nothing is sent."""
        ...


class Channel(Exchange):
    """An exchange made of stages: each tensor passes them in order, the aggregate in reverse.

    Args:
        stages: the last of them may compress.
        path: between which workers, and how; see `noctule.exchange`.
        aggregate: what several workers' tensors become.
        seed: of what the codec draws; each worker draws its own.

    Raises:
        ValueError: a stage compresses and is not the last, two have a weight, or one needs a sum and the aggregate is not the mean.
    """

    def __init__(self, *stages: Stage, path: Path, aggregate: Aggregate = mean, seed: int = 0) -> None:
        """Nothing is sent yet."""
        for stage in stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"a Channel is made of Stage objects, got {stage!r}")
            if stage.needs_sum and aggregate is not mean:
                raise ValueError(
                    f"{type(stage).__name__} shows the sum of all workers only, which is not enough for "
                    f"{getattr(aggregate, '__name__', aggregate)}: use aggregate=mean"
                )
        for stage in stages[:-1]:
            if stage.codec is not None:
                raise ValueError(f"{type(stage).__name__} turns tensors into bytes: it must be the last stage")
        if sum(type(stage).weight is not Stage.weight for stage in stages) > 1:
            raise ValueError(f"a worker has one weight, got two stages that say it: {', '.join(map(repr, stages))}")
        self.stages, self.path, self.aggregate, self.seed = stages, path, aggregate, seed
        self.calls = 0
        """How many exchanges are done."""

    def __repr__(self) -> str:
        """Its stages, path and aggregate: workers compare these before they begin."""
        parts = [repr(stage) for stage in self.stages]
        aggregate = getattr(self.aggregate, "__qualname__", repr(self.aggregate))
        return f"Channel({', '.join([*parts, f'path={type(self.path).__name__}', f'aggregate={aggregate}'])})"

    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The aggregate of each tensor over all workers, in its own shape and dtype.

        Where any of them is not finite, everybody owes what it owed before: the step is to be skipped, as GradScaler does. So it
        is after an exchange that raises.
        """
        if len(tensors) != len(keys) or len(set(keys)) != len(keys):
            raise ValueError(
                f"every tensor needs a key of its own, got {len(tensors)} tensors and the keys {list(keys)!r:.200}"
            )
        weight, sent = 1.0, [list(tensors)]
        for stage in self.stages:
            stage.scale = weight
            weight *= stage.weight()
            sent.append([stage.send(x, key) for x, key in zip(sent[-1], keys, strict=True)])
        turn = float(self.calls % 64)  # small, so that sums of its squares are exact even in float32
        found = self.path(sent[-1], keys, self._codec, self.aggregate, (weight, turn, turn * turn), self._generator())
        weights, turns, squares = found.numbers
        if self.path.world * squares != turns * turns:
            raise ExchangeError(
                f"worker {self.path.rank} is at exchange {self.calls} and others are at another one: every worker must take "
                "part in every exchange (did one go on after an exchange that failed, or load the state of another step?)"
            )
        self.calls += 1
        totals, mean_weight = found.totals, weights / self.path.world
        for stage in reversed(self.stages):
            totals = [stage.close(total, key, mean_weight) for total, key in zip(totals, keys, strict=True)]
        # All workers have the same totals, so after an overflow all of them skip the step, and nothing was delivered.
        if self.stages and self.stages[-1].owes and all(map(all_finite, totals)):
            for x, delivered, key in zip(sent[-1], found.delivered, keys, strict=True):
                self.stages[-1].arrived(x, delivered, key)
        return totals

    @property
    def counts(self) -> bool:
        """Whether no stage has a weight of zero."""
        return all(stage.weight() > 0.0 for stage in self.stages)

    def share(self, message: bytes) -> list[bytes]:
        """What every worker has to say, in their order."""
        return self.path.share(message)

    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Work:
        """What an exchange of such tensors would take."""
        return self.path.rehearse(tensors, self._codec)

    def release(self) -> dict[str, Tensor]:
        """What is owed."""
        return {key: owed for stage in self.stages for key, owed in stage.release().items()}

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """The numbers of this key changed their places, and now have this shape."""
        for stage in self.stages:
            stage.remapped(key, remap, shape)

    def state_dict(self) -> dict[str, Any]:
        """The stages' states and how many exchanges are done, from which all that is drawn follows."""
        return {"calls": self.calls, "stages": [stage.state_dict() for stage in self.stages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it is of a channel with other stages.
        """
        if len(state["stages"]) != len(self.stages):
            raise ValueError(
                f"this state is of a channel of {len(state['stages'])} stages, this one has {len(self.stages)}"
            )
        for stage, part in zip(self.stages, state["stages"], strict=True):
            stage.load_state_dict(part)
        self.calls = int(state["calls"])

    @property
    def _codec(self) -> Codec | None:
        return self.stages[-1].codec if self.stages else None

    def _generator(self) -> torch.Generator:
        """Another one for each worker and exchange, so that resuming goes on with the same draws."""
        mixed = (
            self.seed * 0x9E3779B97F4A7C15 + self.calls * 0xBF58476D1CE4E5B9 + self.path.rank * 0x94D049BB133111EB
        ) % 2**63
        return torch.Generator().manual_seed(mixed)
