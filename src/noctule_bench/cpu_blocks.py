"""The products of blocks on the CPU beside those of single weights and of the whole matrix, float32 and bfloat16.

Kernels alone: activations lie feature-major, as they do between sparse layers; the matrix products of torch get them by the batch.
Each density is that of the weights, whatever the block.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noctule import keep_freed_memory, kernels
from noctule.core.errors import UsageError
from noctule.core.topology import Topology
from noctule.kernels.frame import row_length
from noctule.kernels.native import BLOCKS
from noctule.measure import interleave, ratio
from noctule.measure.timing import Timing
from noctule_bench import program

PARTS = ("forward", "dx", "dw")
DENSE = {"dense float32": torch.float32, "dense bfloat16": torch.bfloat16}
TARGETS = {("AVX512", 1024): 1.8, ("AVX512", 4096): 2.0, ("AVX2", 1024): 1.4, ("AVX2", 4096): 1.4}
"""(instruction set, features) -> how many times as fast as single weights blocks of 8 x 8 are, at 5 to 20 % and batch 128."""

Calls = dict[str, Callable[[], Any]]


def cpu_blocks(
    *,
    sizes: tuple[int, ...] = (1024, 4096),
    batch: int = 128,
    blocks: tuple[int, ...] = BLOCKS,
    densities: tuple[float, ...] = (0.2, 0.1, 0.05),
    threads: int = 1,
    rounds: int = 9,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Time products over blocks on the CPU, forward and both gradients, against single weights and dense products.

    Args:
        sizes: features in and out, multiples of each block.
        batch: samples of a call.
        blocks: rows and columns of a block.
        densities: shares of the weights that are stored.
        threads: of all products.
        rounds: in which all take turns.
        seed: of the numbers.
        out: a file that the lines are appended to.
    """
    program.at_least_one(batch=batch, threads=threads, rounds=rounds, sizes=min(sizes, default=0))
    if wrong := [b for b in blocks if b not in BLOCKS or any(size % b for size in sizes)]:
        raise UsageError(f"blocks must be of {BLOCKS} and divide --sizes {sizes}, got {wrong}")
    if not all(0.0 < density <= 1.0 for density in densities):
        raise UsageError(f"densities must lie in (0, 1], got {densities}")
    torch.manual_seed(seed)
    keep_freed_memory()
    torch.set_num_threads(threads)
    lines, written = program.Lines(out), list[dict[str, Any]]()
    for size in sizes:
        for density in densities:
            written += _measure(lines, size, batch, blocks, density, rounds)
    columns: dict[str, program.Column] = {
        "features": lambda line: str(line["features"][0]),
        "density": "{density:g}",
        "row": "{row}",
        **{part: lambda line, part=part: f"{1e3 * line[part]:.2f}" for part in PARTS},
        "ms": program.milliseconds(2),
        "GF/s": "{gflops:.0f}",
        "beside single weights": program.TIMES,
    }
    program.table(written, "cpu_blocks", f"cpu_blocks: medians in ms, batch {batch}, {threads} thread(s)", columns)
    shown: dict[str, program.Column] = {"what": "{row}", "features": lambda line: str(line["features"][0])}
    shown |= {"density": "{density:g}", "beside single weights": program.TIMES}
    program.targets(written, "cpu_blocks", shown)
    program.show_errors(written)


def _measure(
    lines: program.Lines, size: int, batch: int, blocks: tuple[int, ...], density: float, rounds: int
) -> list[dict[str, Any]]:
    about = {"features": [size, size], "batch": batch, "density": density}
    rows = {f"{block} x {block}": _sparse(size, batch, block, density) for block in (1, *blocks)}
    rows |= {name: _dense(size, batch, dtype) for name, dtype in DENSE.items()}
    found = [lines.write("cpu_blocks", row=name, **about, error=why) for name, why in _hopeless(rows).items()]
    rows = {name: parts for name, parts in rows.items() if all(name != line["row"] for line in found)}
    calls = {f"{name} {part}": call for name, parts in rows.items() for part, call in parts.items()}
    once = {name: own.minimum for name, own in interleave(calls, rounds=1, warmup=2).items()}
    repeats = {name: max(1, min(100, int(0.02 / seconds))) for name, seconds in once.items()}

    def several(call: Callable[[], Any], count: int) -> None:
        for _ in range(count):
            call()

    turns = {n: partial(several, call, repeats[n]) for n, call in calls.items()}
    taken = interleave(turns, rounds=rounds, warmup=0)
    parts = {n: Timing(tuple(s / repeats[n] for s in timing.samples)) for n, timing in taken.items()}
    whole = {row: Timing(tuple(map(sum, zip(*(parts[f"{row} {p}"].samples for p in PARTS))))) for row in rows}
    for row, timing in whole.items():
        beside = ratio(whole["1 x 1"], timing)
        work = 6e-9 * size * size * batch * (1.0 if row in DENSE else density)
        figures = {part: parts[f"{row} {part}"].median_seconds for part in PARTS}
        figures |= {"timing": timing.as_dict(), "gflops": work / timing.median_seconds, "speedup": beside.as_dict()}
        found.append(lines.write("cpu_blocks", row=row, **about, **figures))
        target = TARGETS.get((found[-1]["machine"]["instruction_set"], size))
        if row == "8 x 8" and target and batch == 128 and 0.05 <= density <= 0.2:
            holds = {"target": target, "holds": beside.value >= target, "speedup": beside.as_dict()}
            found.append(lines.write("cpu_blocks.target", row=row, **about, **holds))
    return found


def _hopeless(rows: dict[str, Calls]) -> dict[str, str]:
    """Dense rows that take more than ten times as long as float32, as bfloat16 does on processors that have none, and why."""
    taken = {name: sum(t.minimum for t in interleave(rows[name], rounds=1, warmup=0).values()) for name in DENSE}
    times = {name: seconds / taken["dense float32"] for name, seconds in taken.items()}
    return {name: f"left out: {t:.0f} times as slow as float32 here" for name, t in times.items() if t > 10.0}


def _numbers(features: int, batch: int, dtype: torch.dtype) -> Tensor:
    """(F, B), lying as what the kernels return does."""
    return torch.randn(features, row_length(batch, dtype.itemsize)).to(dtype)[:, :batch]


def _sparse(size: int, batch: int, block: int, density: float) -> Calls:
    grid = size // block
    topology = Topology.random((grid, grid), max(1, round(density * grid * grid)))
    values = torch.randn(topology.size, *((block, block) if block > 1 else ()))
    x_IB, dy_OB = _numbers(size, batch, torch.float32), _numbers(size, batch, torch.float32)
    return {
        "forward": lambda: kernels.spmm(topology, values, x_IB),
        "dx": lambda: kernels.spmm_t(topology, values, dy_OB),
        "dw": lambda: kernels.sddmm(topology, dy_OB, x_IB),
    }


def _dense(size: int, batch: int, dtype: torch.dtype) -> Calls:
    weight = torch.randn(size, size).to(dtype)
    x_BI, dy_BO = torch.randn(batch, size).to(dtype), torch.randn(batch, size).to(dtype)
    return {
        "forward": lambda: x_BI @ weight.t(),
        "dx": lambda: dy_BO @ weight,
        "dw": lambda: dy_BO.t() @ x_BI,
    }
