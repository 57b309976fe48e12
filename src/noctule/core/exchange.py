"""The contracts of exchanges between workers: each gives tensors, and all get their aggregate.

An `Exchange` is what strategies and hooks call. `Channel` is the usual one: stages, a path between the workers, an aggregate.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from noctule.core.aggregate import Aggregate, mean
from noctule.core.codec import Codec
from noctule.core.errors import ExchangeError
from noctule.core.finite import all_finite
from noctule.core.random import generator
from noctule.core.remap import Remap


@dataclass(frozen=True)
class Cost:
    """What one exchange costs a worker."""

    seconds: float
    """Seconds of encoding and decoding on this machine."""
    sent_bytes: float
    rounds: int
    """The number of messages that wait for one another."""


class Exchange(ABC):
    """Every worker gives tensors and gets their aggregate; all call it with the same keys and shapes, in the same order."""

    @abstractmethod
    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The aggregates; ``keys`` name the tensors for whatever is kept of them from one call to the next."""

    @abstractmethod
    def share(self, message: bytes) -> list[bytes]:
        """The messages of all workers, by rank: for small facts, not for tensors."""

    @property
    def at_once(self) -> bool:
        """Whether all tensors should come in one call, not each as soon as it is there: it takes rounds rather than bytes."""
        return False

    @property
    def counts(self) -> bool:
        """Whether what this worker gives now enters the aggregates: not where it has nothing, with a `Weigh` of zero."""
        return True

    def groups(self) -> tuple[object, ...]:
        """The process groups that it communicates in: nothing else may use them while it runs in a thread."""
        return ()

    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Cost:
        """The cost of an exchange of such tensors; nothing is sent and nothing kept."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say what it takes, so nothing can choose it by its price"
        )

    def release(self) -> dict[str, Tensor]:
        """Key -> the residual that is owed for it, which the caller must send: nothing is owed here from now on."""
        return {}

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:  # noqa: B027 most keep nothing
        """The numbers of this key changed their places, and now have this shape: move what is kept for them."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 most keep nothing
        """Restore what `state_dict` gave."""

    # The three parts of an exchange that is made in several calls, as of a bucket of gradients each. Most have nothing to do
    # before or after; an exchange that chooses among others decides in `begin`, and is told the end.

    def begin(self, likes: Sequence[Tensor], keys: Sequence[str]) -> "Exchange":
        """The exchange to call for the parts of all these tensors."""
        return self

    @property
    def corrects(self) -> bool:
        """Whether `corrected` may add something to the tensors of the exchange that has begun."""
        return False

    def corrected(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The tensors to give to the exchange that `begin` returned: these, and what is owed from earlier ones."""
        return list(tensors)

    def finished(self, *, delivered: bool) -> None:  # noqa: B027 most need not know
        """All parts are exchanged; where their step is to be skipped, nothing of them counts as ``delivered``."""


class Wrapped(Exchange):
    """Another exchange with something added: every member is that of ``inner``, unless a subclass changes it.

    The parts of an exchange in several calls are the exception: they are calls of this one, which sees every tensor.
    """

    @property
    @abstractmethod
    def inner(self) -> Exchange:
        """The exchange that does the work."""

    @override
    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        return self.inner(tensors, keys)

    @override
    def share(self, message: bytes) -> list[bytes]:
        return self.inner.share(message)

    @property
    @override
    def at_once(self) -> bool:
        return self.inner.at_once

    @property
    @override
    def counts(self) -> bool:
        return self.inner.counts

    @override
    def groups(self) -> tuple[object, ...]:
        return self.inner.groups()

    @override
    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Cost:
        return self.inner.rehearse(tensors, keys)

    @override
    def release(self) -> dict[str, Tensor]:
        return self.inner.release()

    @override
    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        self.inner.remapped(key, remap, shape)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def __repr__(self) -> str:
        """What must be equal on all workers."""
        return f"{type(self).__name__}({self.inner!r})"


class Stage:
    """One step of a tensor's way out and of the aggregate's way back: override what you need, by default all passes unchanged."""

    needs_sum = False
    """Whether it hides single contributions, so that only a sum over all workers makes sense."""
    codec: Codec | None = None
    """The codec that turns tensors into bytes; only the last stage may have one."""
    owes = False
    """Whether it keeps residuals, so that as the last stage it is told what `arrived`."""
    scale = 1.0
    """The product of the factors of the stages before it, set by the `Channel` before `send`."""

    def weight(self) -> float:
        """How much this worker counts beside the others."""
        return 1.0

    def send(self, x: Tensor, key: str) -> Tensor:
        """The tensor that goes on instead of ``x``."""
        return x

    def arrived(self, sent: Tensor, delivered: Tensor, key: str) -> None:
        """Of what this stage sent, ``delivered`` has entered the aggregate; not called if the step is to be skipped."""

    def close(self, total: Tensor, key: str, weight: float) -> Tensor:
        """The aggregate that goes on instead of ``total``; ``weight`` is the mean of all workers' weights."""
        return total

    def release(self) -> dict[str, Tensor]:
        """Key -> the residual that is owed for it, which the caller must send."""
        return {}

    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        """The numbers of this key changed their places, and now have this shape: move what is kept for them."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def __repr__(self) -> str:
        """What must be equal on all workers."""
        return type(self).__name__


@dataclass(frozen=True)
class Arrived:
    """The result of an exchange over a path."""

    totals: list[Tensor]
    """The aggregates."""
    delivered: list[Tensor]
    """What of each tensor of this worker has entered the aggregates."""
    numbers: list[float]
    """The sums, over all workers, of the numbers sent along."""


class Path(ABC):
    """How tensors and messages get from every worker to every other."""

    rank: int
    world: int

    @abstractmethod
    def __call__(
        self,
        tensors: Sequence[Tensor],
        keys: Sequence[str],
        codec: Codec | None,
        aggregate: Aggregate,
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Arrived:
        """Encode, send, receive, decode, aggregate.

        Raises:
            ExchangeError: a message is not what it must be.
        """

    @abstractmethod
    def share(self, message: bytes) -> list[bytes]:
        """The messages of all workers, of any lengths, by rank."""

    @abstractmethod
    def rehearse(self, tensors: Sequence[Tensor], codec: Codec | None) -> Cost:
        """The cost of an exchange of such tensors; nothing is sent."""

    def groups(self) -> tuple[object, ...]:
        """The process groups that it communicates in."""
        return ()


class Channel(Exchange):
    """An exchange made of stages: each tensor passes them in order, the aggregate in reverse.

    Args:
        stages: the last of them may compress.
        path: between which workers, and how; see `noctule.exchange`.
        aggregate: makes one tensor of all workers' tensors.
        seed: of the codec's random draws; each worker draws others.

    Raises:
        ValueError: a stage compresses and is not the last, two have a weight, or one needs a sum and the aggregate is not the mean.
    """

    def __init__(self, *stages: Stage, path: Path, aggregate: Aggregate = mean, seed: int = 0) -> None:
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
        """The number of exchanges done."""

    def __repr__(self) -> str:
        """The stages, path and aggregate, which must be equal on all workers."""
        parts = [repr(stage) for stage in self.stages]
        aggregate = getattr(self.aggregate, "__qualname__", repr(self.aggregate))
        return f"Channel({', '.join([*parts, f'path={type(self.path).__name__}', f'aggregate={aggregate}'])})"

    @override
    def __call__(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """The aggregate of each tensor over all workers, in its own shape and dtype.

        If an aggregate is not finite, all workers keep the residuals from before: the step is to be skipped, as GradScaler does.
        So it is after an exchange that raises.
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
        number = float(self.calls % 64)  # small, so that sums of squares are exact even in float32
        draws = generator(self.seed, self.calls, self.path.rank)  # resuming goes on with the same draws
        found = self.path(sent[-1], keys, self._codec, self.aggregate, (weight, number, number * number), draws)
        weights, numbers, squares = found.numbers
        if not _are_equal(self.path.world, numbers, squares):
            raise ExchangeError(
                f"worker {self.path.rank} is at exchange {self.calls} and others are at another one: every worker must take "
                "part in every exchange (did one go on after an exchange that failed, or load the state of another step?)"
            )
        self.calls += 1
        totals, mean_weight = found.totals, weights / self.path.world
        for stage in reversed(self.stages):
            totals = [stage.close(total, key, mean_weight) for total, key in zip(totals, keys, strict=True)]
        # All workers have the same totals, so after an overflow all of them skip the step, and nothing counts as delivered.
        if self.stages and self.stages[-1].owes and all(map(all_finite, totals)):
            for x, delivered, key in zip(sent[-1], found.delivered, keys, strict=True):
                self.stages[-1].arrived(x, delivered, key)
        return totals

    @property
    @override
    def counts(self) -> bool:
        return all(stage.weight() > 0.0 for stage in self.stages)

    @override
    def share(self, message: bytes) -> list[bytes]:
        return self.path.share(message)

    @override
    def groups(self) -> tuple[object, ...]:
        return self.path.groups()

    @override
    def rehearse(self, tensors: Sequence[Tensor], keys: Sequence[str]) -> Cost:
        return self.path.rehearse(tensors, self._codec)

    @override
    def release(self) -> dict[str, Tensor]:
        return {key: owed for stage in self.stages for key, owed in stage.release().items()}

    @override
    def remapped(self, key: str, remap: Remap, shape: tuple[int, ...]) -> None:
        for stage in self.stages:
            stage.remapped(key, remap, shape)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The stages' states and the number of exchanges done, from which all random draws follow."""
        return {"calls": self.calls, "stages": [stage.state_dict() for stage in self.stages]}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of a channel with other stages.
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


def _are_equal(count: int, total: float, total_of_squares: float) -> bool:
    """Whether so many numbers are equal, by their sum and that of their squares."""
    # Cauchy-Schwarz: count * sum(n²) = sum(n)² only if all n are equal, and sums are all that an all-reduce brings.
    return count * total_of_squares == total * total
