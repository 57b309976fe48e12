"""Measure what a block of code costs: seconds, memory, operations, energy."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from noctule.measure.energy import metering
from noctule.measure.memory import cuda_peak, resident_bytes, resident_peak
from noctule.measure.operations import listening


@dataclass
class Measurement:
    """What a block cost; filled in when the block ends, however it ends. None means "not available"."""

    seconds: float = 0.0
    """Time on the clock."""
    cpu_seconds: float = 0.0
    """Time on the cores, all threads of this process together."""
    memory_before_bytes: int | None = None
    """Resident memory of this process when the block began."""
    peak_memory_bytes: int | None = None
    """The peak of resident memory of this process during the block, all that was there before included."""
    peak_cuda_bytes: int | None = None
    """The peak of what torch had allocated on CUDA devices, None where CUDA is not in use."""
    joules: float | None = None
    """Energy of the whole machine's processors and their memory (not of GPUs)."""
    multiply_adds: int = 0
    """Operations that kernels counted; with `dense_operations`, those of torch's matrix products too."""
    notes: list[str] = field(default_factory=list)
    """What to know about how these numbers were found."""

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One line to read."""
        parts = [f"{self.seconds:.4g} s", f"{self.cpu_seconds:.4g} s of CPU", f"{self.multiply_adds:,} multiply-adds"]
        parts.append(f"peak memory {_mib(self.peak_memory_bytes)}")
        if self.peak_cuda_bytes is not None:
            parts.append(f"peak CUDA memory {_mib(self.peak_cuda_bytes)}")
        parts.append("joules not available" if self.joules is None else f"{self.joules:.4g} J")
        return ", ".join(parts + self.notes)


@contextmanager
def measure(*, dense_operations: bool = False) -> Iterator[Measurement]:
    """Measure a block of code; blocks may be nested, and each sees all that happens inside it.

    `dense_operations` also counts the matrix products and convolutions of torch itself, half a multiply-add for each of
    their flops. That costs Python time per operation: do not time such a block. Kernels that report their operations
    and are made of torch's matrix products would count twice.

    >>> with measure(dense_operations=True) as cost:
    ...     product = torch.ones(4, 5) @ torch.ones(5, 6)
    >>> cost.multiply_adds
    120
    """
    result = Measurement(memory_before_bytes=resident_bytes())
    with ExitStack() as stack:
        flops = _flop_counter(stack) if dense_operations else None
        energy = stack.enter_context(metering())
        memory = stack.enter_context(resident_peak())
        cuda = stack.enter_context(cuda_peak())
        counter = stack.enter_context(listening())
        _wait_for_cuda()
        cpu_start, start = time.process_time(), time.perf_counter()
        try:
            yield result
        finally:
            try:
                _wait_for_cuda()  # may raise what a kernel of the block did wrong
            finally:
                result.seconds = time.perf_counter() - start
                result.cpu_seconds = time.process_time() - cpu_start
                stack.close()
                result.peak_memory_bytes = memory.peak_bytes or None
                result.peak_cuda_bytes = cuda.peak_bytes if torch.cuda.is_initialized() else None
                result.joules = energy.microjoules / 1e6 if energy.available else None
                result.multiply_adds = counter.multiply_adds + (_dense(flops) if flops else 0)
                result.notes = [memory.note] if memory.note else []


def _dense(flops: Any) -> int:
    """The multiply-adds that torch counted, without those of our own kernels, which report to torch too."""
    by_operator = flops.get_flop_counts().get("Global", {})
    return (
        flops.get_total_flops() - sum(n for op, n in by_operator.items() if str(op) == "noctule.multiply_adds")
    ) // 2


def _flop_counter(stack: ExitStack) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return stack.enter_context(FlopCounterMode(display=False))


def _wait_for_cuda() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _mib(value_bytes: int | None) -> str:
    return "not available" if value_bytes is None else f"{value_bytes / 2**20:,.1f} MiB"
