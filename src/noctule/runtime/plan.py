"""What to call for a batch: where each value lies, and the compiled functions with their arguments, in order."""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from noctule.runtime.graph import Graph
from noctule.runtime.operators import Buffer, Call, Reshape

ALIGNMENT = 64
SLACK = 128
"""Bytes behind each value that kernels may read, never write."""


class Memory:
    """The values of a graph in one piece of memory, for a largest batch; a value's room is used again after its last reader."""

    def __init__(self, graph: Graph, lanes: int) -> None:
        owner = [*range(len(graph.values))]  # the value whose memory each one has
        last = [*range(len(graph.values))]
        for number, step in enumerate(graph.steps, start=1):
            if isinstance(step.operator, Reshape):
                owner[number] = owner[step.of[0]]
            for k in step.of:
                last[owner[k]] = number
        last[owner[-1]] = len(graph.values)
        taken: list[tuple[int, int, int]] = []  # (begin, end, the value)
        begins = [0] * len(graph.values)
        self.nbytes = 0
        for number, value in enumerate(graph.values):
            if owner[number] != number:
                begins[number] = begins[owner[number]]
                continue
            size = -(-(value.numbers * value.dtype.itemsize * lanes + SLACK) // ALIGNMENT) * ALIGNMENT
            taken = [piece for piece in taken if last[piece[2]] >= number]
            begin = 0
            for other_begin, other_end, _ in sorted(taken):
                if other_begin - begin >= size:
                    break
                begin = max(begin, other_end)
            taken.append((begin, begin + size, number))
            begins[number] = begin
            self.nbytes = max(self.nbytes, begin + size)
        self._bytes = np.zeros(self.nbytes + ALIGNMENT, np.uint8)
        start = aligned(self._bytes)
        self.addresses = [start + begin for begin in begins]


class Kept:
    """What operators made of their weights for the kernels, by operator and purpose."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made for this key before, or what ``make`` makes now."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class BatchPlan:
    """The calls for one number of lanes.

    Args:
        graph: what is computed.
        memory: where its values lie.
        kept: of the model.
        lanes: room for samples side by side; those that a batch does not fill hold zeros.
    """

    def __init__(self, graph: Graph, memory: Memory, kept: Kept, lanes: int) -> None:
        self._kept, self._used, self._most = kept, 0, 0
        self._scratch = np.zeros(ALIGNMENT, np.uint8)
        pairs = zip(graph.values, memory.addresses, strict=True)
        self.buffers = [Buffer(value, address, lanes) for value, address in pairs]
        self._write(graph)  # to know the room that is needed
        self._scratch = np.zeros(self._most + SLACK + ALIGNMENT, np.uint8)
        self.calls = self._write(graph)

    def _write(self, graph: Graph) -> list[tuple[Call, str]]:
        calls: list[tuple[Call, str]] = []
        for number, step in enumerate(graph.steps, start=1):
            self._used = 0
            made = step.operator.calls(self, [self.buffers[k] for k in step.of], self.buffers[number])
            calls += [(call, step.name) for call in made]
        return calls

    def scratch(self, nbytes: int) -> int:
        """The address of memory that nothing else uses during the calls of this step."""
        begin = self._used
        self._used += -(-(nbytes + SLACK) // ALIGNMENT) * ALIGNMENT
        self._most = max(self._most, self._used)
        return aligned(self._scratch) + begin

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made for this key before, or what ``make`` makes now; it lives as long as the model."""
        return self._kept.keep(key, make)

    def held(self, key: Hashable, make: Callable[[], np.ndarray]) -> int:
        """The address of an array that is kept in this way."""
        return self.keep(key, lambda: np.ascontiguousarray(make())).ctypes.data


def aligned(array: np.ndarray) -> int:
    """The first address in an array that begins a cache line."""
    return -(-array.ctypes.data // ALIGNMENT) * ALIGNMENT
