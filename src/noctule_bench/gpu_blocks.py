"""The products of blocks on a CUDA device beside cuBLAS on the whole matrix and torch's own sparse blocks, in bfloat16.

All repeat calls on the same numbers, so that part of them stays in the second-level cache for every row alike. The matrix of cuBLAS
has no zeros, since a GPU multiplies zeros faster. torch has no product for the gradient of the weights of its blocks.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noctule import kernels
from noctule.core.errors import UsageError
from noctule.core.topology import Topology
from noctule.measure import interleave, ratio
from noctule.measure.timing import Timing
from noctule_bench import program

OURS, CUBLAS, BSR = "noctule", "cublas", "torch BSR"
PARTS = ("forward", "dx", "dw")
TARGET_BLOCK, TARGET_DENSITY, TARGET = 32, 0.1, 5.0
"""How many times as fast as cuBLAS, forward and backward, 4096 x 4096 and batch 4096."""

Calls = dict[tuple[str, str], Callable[[], Any]]
"""(row, part) -> a call that starts it."""


def gpu_blocks(
    *,
    size: int = 4096,
    batch: int = 4096,
    blocks: tuple[int, ...] = (16, 32, 64),
    densities: tuple[float, ...] = (0.05, 0.1, 0.2),
    rounds: int = 15,
    calls: int = 20,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Time block-sparse products on a CUDA device, forward and both gradients, against cuBLAS and torch's sparse blocks.

    Args:
        size: features in and out, a multiple of each block.
        batch: samples of a call.
        blocks: rows and columns of a block.
        densities: shares of the blocks that are stored.
        rounds: in which all take turns.
        calls: in each turn, one after another, before the device is waited for.
        seed: of the numbers.
        out: a file that the lines are appended to.
    """
    program.at_least_one(size=size, batch=batch, rounds=rounds, calls=calls, blocks=min(blocks, default=0))
    if wrong := [block for block in blocks if size % block or block not in (16, 32, 64)]:
        raise UsageError(f"blocks must be 16, 32 or 64 and divide --size {size}, got {wrong}")
    if not all(0.0 < density <= 1.0 for density in densities):
        raise UsageError(f"densities must lie in (0, 1], got {densities}")
    if not torch.cuda.is_available() or find_spec("triton") is None:
        raise UsageError(
            "gpu_blocks needs a CUDA device and Triton (pip install triton): torch or Python finds none here"
        )
    torch.manual_seed(seed)
    lines, written = program.Lines(out), list[dict[str, Any]]()
    for block in blocks:
        for density in densities:
            written += _measure(lines, size, batch, block, density, rounds, calls)
    columns: dict[str, program.Column] = {
        "row": "{row}",
        "part": "{part}",
        "block": "{block}",
        "density": "{density:g}",
        "us": lambda line: f"{1e6 * line['seconds']:.0f}",
        "beside cublas": program.TIMES,
    }
    program.table(written, "gpu_blocks", f"gpu_blocks: medians, {size} x {size}, batch {batch}, bf16", columns)
    program.targets(written, "gpu_blocks", {"what": "{row}", "beside cublas": program.TIMES})
    program.show_errors(written)


def _measure(
    lines: program.Lines, size: int, batch: int, block: int, density: float, rounds: int, calls: int
) -> list[dict[str, Any]]:
    made, error = _calls(size, batch, block, density)
    failed = dict[tuple[str, str], str]()
    for key, call in list(made.items()):
        try:
            call()
            torch.cuda.synchronize()
        except Exception as reason:  # torch's blocks raise anything; their row says it, ours still raises
            if key[0] == OURS:
                raise
            failed[key] = str(reason)
            del made[key]

    def turn(call: Callable[[], Any]) -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    names = {" ".join(key): key for key in made}
    taken = interleave({name: lambda c=made[key]: turn(c) for name, key in names.items()}, rounds=rounds)
    times = {key: Timing(tuple(s / calls for s in taken[name].samples)) for name, key in names.items()}
    about = {"features": [size, size], "batch": batch, "block": block, "density": density}
    about |= {"dtype": "bfloat16", "gpu": torch.cuda.get_device_name(), "calls": calls}
    found = []
    for (row, part), timing in times.items():
        beside = ratio(times[CUBLAS, part], timing)
        work = 2e-12 * size * size * batch * (1.0 if row == CUBLAS else density)
        figures = {"seconds": timing.median_seconds, "timing": timing.as_dict(), "tflops": work / timing.median_seconds}
        figures |= {"speedup": beside.as_dict()} | ({"error_of_y": error} if row == OURS else {})
        found.append(lines.write("gpu_blocks", row=row, part=part, **about, **figures))
    found += [lines.write("gpu_blocks", row=f"{r} {p}", part=p, **about, error=why) for (r, p), why in failed.items()]
    if (size, batch, block, density) == (4096, 4096, TARGET_BLOCK, TARGET_DENSITY):
        for name, parts in (("forward", PARTS[:1]), ("backward", PARTS[1:])):
            whole = {row: _sum([times[row, part] for part in parts]) for row in (OURS, CUBLAS)}
            beside = ratio(whole[CUBLAS], whole[OURS])
            figures = {"speedup": beside.as_dict(), "target": TARGET, "holds": beside.value >= TARGET}
            found.append(lines.write("gpu_blocks.target", row=name, **about, **figures))
    return found


def _sum(timings: list[Timing]) -> Timing:
    return Timing(tuple(map(sum, zip(*(timing.samples for timing in timings)))))


def _calls(size: int, batch: int, block: int, density: float) -> tuple[Calls, float]:
    """The calls of all rows, and the largest error of our Y over its largest number."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    grid = size // block
    topology = Topology.random((grid, grid), max(1, round(density * grid * grid))).to("cuda")
    back, values = topology.transposed, numbers(topology.size, block, block)
    weight, x_BI, dy_BO, x_IB, dy_OB = (numbers(*s) for s in ((size, size), *[(batch, size)] * 2, *[(size, batch)] * 2))

    def bsr(row_ptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        return torch.sparse_bsr_tensor(row_ptr.int(), columns.int(), values, (size, size))

    w = bsr(topology.row_ptr, topology.columns, values)
    w_t = bsr(back.row_ptr, back.columns, values[back.slots.long()].mT.contiguous())
    expected = w.to_dense().float() @ x_IB.float()
    error = (kernels.spmm(topology, values, x_IB)[0] - expected).abs().max() / expected.abs().max()
    calls: Calls = {
        (OURS, "forward"): lambda: kernels.spmm(topology, values, x_IB),
        (OURS, "dx"): lambda: kernels.spmm_t(topology, values, dy_OB),
        (OURS, "dw"): lambda: kernels.sddmm(topology, dy_OB, x_IB),
        (CUBLAS, "forward"): lambda: x_BI @ weight.t(),
        (CUBLAS, "dx"): lambda: dy_BO @ weight,
        (CUBLAS, "dw"): lambda: dy_BO.t() @ x_BI,
        (BSR, "forward"): lambda: w @ x_IB,
        (BSR, "dx"): lambda: w_t @ dy_OB,
    }
    return calls, float(error)
