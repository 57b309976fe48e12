"""A shipped model that is ready to be called."""

import os
import threading

import numpy as np

from noctule.runtime import _native
from noctule.runtime.fields import ModelFileError
from noctule.runtime.file import read
from noctule.runtime.graph import Graph
from noctule.runtime.plan import BatchPlan, Kept, Memory

MOST_PLANS = 16
"""Numbers of lanes for which calls are kept."""


class Model:
    """A graph with its memory; calling it computes the output of a batch on one processor core.

    Memory is made once, for ``max_batch`` samples; larger batches go through in pieces. Calls from several threads wait for one
    another: give each thread a model of its own.

    Args:
        graph: from `read`.
        max_batch: samples that are computed at a time at most.

    Raises:
        ModelFileError: the model needs more memory than the machine has.
    """

    def __init__(self, graph: Graph, *, max_batch: int = 64) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        if graph.output.kind != "float32":
            raise ModelFileError(f"the output of a model is float32, this one's is {graph.output.kind}")
        self.graph, self.max_batch = graph, max_batch
        lanes = lanes_of(max_batch)
        needed = max(value.numbers * value.dtype.itemsize for value in graph.values) * lanes
        if needed > (most := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            raise ModelFileError(
                f"a value of {max_batch} samples takes {needed:,} bytes, this machine has {most:,}: give a smaller max_batch"
            )
        try:
            self._memory, self._kept, self._plans = Memory(graph, lanes), Kept(), dict[int, BatchPlan]()
        except MemoryError as error:
            raise ModelFileError(f"{max_batch} samples do not fit into memory: give a smaller max_batch") from error
        self._lock = threading.Lock()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.graph.input.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.graph.output.shape

    def __call__(self, x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
        """Outputs (B, ...), float32, of inputs (B, ...).

        Args:
            x: float32 (other numbers are converted), or whole numbers where the model reads tokens.
            out: float32 (B, ...), contiguous, to write to.

        Raises:
            ValueError: the input has another shape or kind, or numbers that are NaN or infinite.
        """
        x = self._checked(np.asarray(x))
        shape = (len(x), *self.output_shape)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out must be contiguous float32 {shape}, got {out.dtype} {out.shape}")
        with self._lock:
            for at in range(0, len(x), self.max_batch):
                self._run(x[at : at + self.max_batch], out[at : at + self.max_batch])
        return out

    def _checked(self, x: np.ndarray) -> np.ndarray:
        tokens, expected = self.graph.input.kind == "tokens", ("B", *self.input_shape)
        if x.shape[1:] != self.input_shape or x.ndim != len(self.input_shape) + 1:
            raise ValueError(f"expected inputs of shape ({', '.join(map(str, expected))}), got {x.shape}")
        if x.dtype.kind not in ("iu" if tokens else "fiub"):
            raise ValueError(f"expected {'whole numbers' if tokens else 'real numbers'}, got {x.dtype}")
        if tokens and x.size and (x.min() < 0 or x.max() > 2**31 - 1):
            raise ValueError(f"tokens lie from 0 to 2^31 - 1, got {x.min()} to {x.max()}")
        return np.ascontiguousarray(x, np.int32 if tokens else np.float32)

    def _run(self, x: np.ndarray, out: np.ndarray) -> None:
        batch, lanes = len(x), lanes_of(len(x))
        plan = self._plans.get(lanes)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            try:
                plan = self._plans[lanes] = BatchPlan(self.graph, self._memory, self._kept, lanes)
            except MemoryError as error:
                raise ModelFileError(f"{batch} samples do not fit into memory: give fewer at a time") from error
        first, last = plan.buffers[0], plan.buffers[-1]
        if _native.enter(
            x.ctypes.data, batch, first.value.numbers, first.address, lanes, first.value.kind == "float32"
        ):
            raise ValueError("the input has numbers that are NaN or infinite")
        for (function, arguments), name in plan.calls:
            if function(*arguments):
                raise ValueError(
                    f"{name or 'the model'} read a token that it has no row for, or a number that is NaN or infinite"
                )
        _native.leave(last.address, lanes, batch, last.value.numbers, out.ctypes.data)


def lanes_of(batch: int) -> int:
    """The room for a batch: whole vectors from eight samples on."""
    return batch if batch < 8 else -(-batch // 8) * 8


def load(path: str | os.PathLike, *, max_batch: int = 64) -> Model:
    """Read a model that `noctule.export(..., to="noctule")` wrote.

    Raises:
        ModelFileError: the file is missing, torn, foreign, too new, or says something that cannot be; the text names the field.
    """
    return Model(read(path), max_batch=max_batch)


def instruction_set() -> str:
    """The instruction set of the kernels that models planned from now on use: "vnni", "avx2" or "portable"."""
    return _native.instruction_set()
