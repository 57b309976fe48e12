"""What a step of a graph is: one operator, written once for checking, for reference and for planning."""

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from noctule.runtime.values import Value

Kept = TypeVar("Kept")
Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A compiled function and its arguments: addresses and numbers, all known when a plan is made."""


@dataclass(frozen=True)
class Buffer:
    """Where a value lies in a plan: feature-major, [d1] ... [dn][lanes], the batch innermost."""

    value: Value
    address: int
    lanes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.value.shape

    @property
    def bytes_each(self) -> int:
        """Bytes of a number."""
        return self.value.dtype.itemsize

    @property
    def numbers(self) -> int:
        """Of all lanes."""
        return self.value.numbers * self.lanes

    def around(self, axis: int) -> tuple[int, int, int]:
        """The numbers before an axis, along it, and from one to the next along it."""
        return math.prod(self.shape[:axis]), self.shape[axis], math.prod(self.shape[axis + 1 :]) * self.lanes


class Plan(Protocol):
    """What an operator may ask for while a plan is made."""

    def scratch(self, nbytes: int) -> int:
        """The address of memory that nothing else uses during the calls of this step."""
        ...

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What was made for this key before, or what ``make`` makes now; it lives as long as the model."""
        ...

    def held(self, key: Hashable, make: Callable[[], np.ndarray]) -> int:
        """The address of an array that is kept in this way."""
        ...


@dataclass(frozen=True, eq=False)
class Operator:
    """A step: a dataclass whose fields are those of the file."""

    @abstractmethod
    def infer(self, *inputs: Value) -> Value:
        """Check the values that the step reads and say what it makes; raises ValueError with what is wrong."""

    @abstractmethod
    def reference(self, inputs: Sequence[np.ndarray], values: Sequence[Value]) -> np.ndarray:
        """Compute it in numpy from arrays with the batch first, (B, d1, ..., dn), and what they are."""

    @abstractmethod
    def calls(self, plan: Plan, inputs: Sequence[Buffer], output: Buffer) -> list[Call]:
        """What to call to compute it, for the number of lanes of these buffers."""


def check(sound: bool, message: str) -> None:
    """Raise ValueError with this message where something is not so."""
    if not sound:
        raise ValueError(message)


def line(array: np.ndarray | None, length: int, name: str) -> None:
    """Refuse an array that is not a line of finite float32 of this length."""
    if array is not None and (array.dtype != np.float32 or array.shape != (length,) or not np.isfinite(array).all()):
        raise ValueError(f"{name} must be {length} finite float32, got {array.dtype} {array.shape}")
