"""One convolution, forward and all gradients, against torch's dense ones in their layouts and precisions."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noctule import kernels
from noctule.core.errors import UsageError
from noctule.measure import ratio
from noctule.measure.break_even import break_even
from noctule.measure.turns import Process, Turns, Unavailable, Workers
from noctule.sparse.layers import SparseConv2d
from noctule.sparse.layers.convolution import feature_major, shifted
from noctule_bench import program

TARGETS = {0.1: 1.0, 0.05: 2.0, 0.01: 6.0}
"""Density -> how many times as fast as the fastest dense float32 convolution."""
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "feature-major": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}
"""How images lie in memory: (B, C, H, W), (B, H, W, C) or (C, H, W, B)."""


@dataclass(frozen=True)
class Row:
    """A way to convolve."""

    name: str
    layout: str
    dense: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def process(self) -> Process:
        """Noctule's and torch's rows work apart."""
        return Process("torch" if self.dense else "noctule")


ROWS = (
    Row("noctule, feature-major", "feature-major", dense=False),
    Row("noctule, rows", "rows", dense=False),
    Row("noctule bf16, feature-major", "feature-major", dense=False, dtype=torch.bfloat16),
    Row("dense fp32", "rows"),
    Row("dense fp32, channels last", "channels last"),
    Row("dense bf16, channels last", "channels last", dtype=torch.bfloat16),
)
DENSE_FP32 = tuple(row.name for row in ROWS if row.dense and row.dtype is torch.float32)


def convolution(
    *,
    threads: tuple[int, ...] = (1, 2),
    channels: tuple[int, ...] = (64, 256),
    sizes: tuple[int, ...] = (14, 28),
    kernel: int = 3,
    batch: int = 32,
    densities: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.05, 0.01),
    rounds: int = 9,
    block_ms: float = 100.0,
    out: Path | None = None,
) -> None:
    """Time one convolution, forward and the gradients of input, weight and bias, against torch's dense ones.

    Args:
        threads: each of these in turn.
        channels: in and out, each in turn.
        sizes: height and width of the images, each in turn.
        kernel: height and width of the kernel, padded so that images keep their size.
        batch: images in a step.
        densities: of the sparse kernels.
        rounds: turns of each row.
        block_ms: milliseconds of calls in each turn.
        out: a file that the lines are appended to.
    """
    program.at_least_one(kernel=kernel, batch=batch, rounds=rounds, threads=min(threads or (0,)))
    if not all(0.0 < density <= 1.0 for density in densities):
        raise UsageError(f"densities must lie in (0, 1], got {densities}")
    lines = program.Lines(out)
    written: list[dict[str, Any]] = []
    for number in threads:
        torch.set_num_threads(number)  # so that the lines say so
        with Workers(number) as workers:
            for channel in channels:
                for size in sizes:
                    case = _Case(channel, size, kernel, batch)
                    written += _measure(workers, lines, case, densities, rounds, block_ms / 1e3)
                    written.append(_profile(workers, lines, case, min(densities), rounds, block_ms / 1e3))
    _show(written)


@dataclass(frozen=True)
class _Case:
    channels: int
    size: int
    kernel: int
    batch: int

    @property
    def multiply_adds(self) -> int:
        """Of forward and both gradients with all weights, without what the border spares."""
        return 3 * self.channels**2 * self.kernel**2 * self.size**2 * self.batch


def build(row: Row, case: _Case, density: float) -> tuple[Callable[[], object], None]:
    """The step to time, after its results were compared with the dense convolution's.

    Raises:
        Unavailable: they are wrong.
    """
    generator = torch.Generator().manual_seed(0)
    sparse = SparseConv2d(
        case.channels, case.channels, case.kernel, padding=case.kernel // 2, density=density, generator=generator
    )
    dense = sparse.to_dense()
    module: nn.Module = deepcopy(sparse).to(row.dtype)
    if row.dense:
        module = nn.Conv2d(case.channels, case.channels, case.kernel, padding=case.kernel // 2)
        module.load_state_dict(dense.state_dict())
        module = module.to(row.dtype)
        if row.layout == "channels last":
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = (case.batch, case.channels, case.size, case.size)
    x, dy = (LAYOUTS[row.layout](torch.randn(shape, generator=generator)).to(row.dtype) for _ in range(2))
    x.requires_grad_()
    parameters = list(module.parameters())

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = module(x)
        return y, torch.autograd.grad(y, [x, *parameters], dy)

    y, (dx, dweight, _) = step()
    exact_x = x.detach().float().contiguous().requires_grad_()
    exact = dense(exact_x)
    right = torch.autograd.grad(exact, [exact_x, dense.weight], dy.float().contiguous())
    dweight = dweight.flatten()[sparse.topology.keys()] if row.dense else dweight
    tolerance = 1e-4 if row.dtype is torch.float32 else 0.03
    for what, a, b in (
        ("output", y, exact),
        ("dx", dx, right[0]),
        ("dw", dweight, right[1].flatten()[sparse.topology.keys()]),
    ):
        error = float((a.detach().float() - b.detach()).abs().max() / b.detach().abs().max())
        if not error < tolerance:
            raise Unavailable(f"wrong result: {what} is off by {error:.1e} of its largest number")
    return step, None


PASSES = ("place the input", "forward", "place the gradient", "back to the input", "gradient of the weight")


def build_pass(name: str, case: _Case, density: float) -> tuple[Callable[[], object], None]:
    """One of the passes of a feature-major step, alone, on tensors that the passes before it have made."""
    generator = torch.Generator().manual_seed(0)
    layer = SparseConv2d(
        case.channels, case.channels, case.kernel, padding=case.kernel // 2, density=density, generator=generator
    )
    shape = (case.batch, case.channels, case.size, case.size)
    x, dy = (LAYOUTS["feature-major"](torch.randn(shape, generator=generator)) for _ in range(2))
    values = layer.values.detach()
    places = shifted(layer.topology, layer.geometry, (case.size, case.size), case.batch)
    _ = places.transposed  # made now, while the layer lives
    frame, back, dz = kernels.place(x, places.frame), kernels.place(dy, places.back), feature_major(dy)
    return {
        "place the input": lambda: kernels.place(x, places.frame),
        "forward": lambda: kernels.spmm(places, values, places.rows_of(frame)),
        "place the gradient": lambda: kernels.place(dy, places.back),
        "back to the input": lambda: kernels.spmm_t(places, values, places.back_rows_of(back)),
        "gradient of the weight": lambda: kernels.gradients(places, dz, places.rows_of(frame), bias=True),
    }[name], None


def _profile(
    workers: Workers, lines: program.Lines, case: _Case, density: float, rounds: int, block_seconds: float
) -> dict[str, Any]:
    """The passes one at a time, each with the cache to itself, beside a whole step, where each finds what the one before left."""
    row = ROWS[0]
    workers.prepare("step", row.process, build, row, case, density)
    for name in PASSES:
        workers.prepare(name, row.process, build_pass, name, case, density)
    taken = workers.take_turns(rounds=rounds, block_seconds=block_seconds, label=f"profile, {case.channels} channels")
    workers.forget()
    milliseconds = {name: round(turns.timing.median_seconds * 1e3, 4) for name, turns in taken.items()}
    common = {"threads": workers.threads, "channels": case.channels, "size": case.size, "batch": case.batch}
    return lines.write("convolution.profile", **common, row=row.name, density=density, milliseconds=milliseconds)


def _measure(
    workers: Workers, lines: program.Lines, case: _Case, densities: Sequence[float], rounds: int, block_seconds: float
) -> list[dict[str, Any]]:
    where: dict[str, tuple[Row, float]] = {}
    for row in ROWS:
        for density in densities[:1] if row.dense else densities:
            key = row.name if row.dense else f"{row.name}, {density:g}"
            workers.prepare(key, row.process, build, row, case, density)
            where[key] = (row, density)
    label = f"{case.channels} channels, {case.size} x {case.size}, {workers.threads} threads"
    taken = workers.take_turns(rounds=rounds, block_seconds=block_seconds, label=label)
    workers.forget()
    common = {"threads": workers.threads, "channels": case.channels, "size": case.size, "batch": case.batch}
    fastest = min(DENSE_FP32, key=lambda name: taken[name].timing.median_seconds)
    written = []
    for key, turns in taken.items():
        row, density = where[key]
        share = 1.0 if row.dense else density
        written.append(
            lines.write(
                "convolution",
                **common,
                row=row.name,
                density=share,
                timing=turns.timing,
                busy_cores=round(turns.busy_cores, 3),
                gflops=round(2 * share * case.multiply_adds / turns.timing.median_seconds / 1e9, 2),
                against=fastest,
                speedup=ratio(taken[fastest].timing, turns.timing),
            )
        )
    return written + _judge(lines, common, taken, fastest, densities)


def _judge(
    lines: program.Lines,
    common: Mapping[str, Any],
    taken: Mapping[str, Turns],
    fastest: str,
    densities: Sequence[float],
) -> list[dict[str, Any]]:
    written = []
    for row in ROWS:
        if row.dense or row.dtype is not torch.float32:
            continue
        speedups = {d: ratio(taken[fastest].timing, taken[f"{row.name}, {d:g}"].timing) for d in densities}
        density, how = break_even({d: speedup.value for d, speedup in speedups.items()})
        about = {**common, "row": row.name, "against": fastest}
        written.append(lines.write("convolution.break_even", **about, density=density, how=how))
        for d, speedup in speedups.items():
            if d in TARGETS:
                least = TARGETS[d]
                written.append(
                    lines.write(
                        "convolution.target",
                        **about,
                        density=d,
                        speedup=speedup,
                        target=least,
                        holds=speedup.value >= least,
                    )
                )
    return written


def _show(written: Sequence[dict[str, Any]]) -> None:
    def passing(name: str) -> program.Column:
        return lambda line: f"{line['milliseconds'][name]:.2f}"

    case = {"threads": "{threads}", "channels": "{channels}", "size": "{size}"}
    row, density = {"row": "{row}"}, {"density": "{density:g}"}
    program.table(
        written,
        "convolution",
        "convolution: milliseconds for forward and all gradients",
        {
            **row,
            **case,
            **density,
            "ms": program.milliseconds(2),
            "GF/s": "{gflops:.1f}",
            "x fastest dense fp32": program.speedup,
        },
    )
    program.table(
        written,
        "convolution.break_even",
        "convolution: noctule is faster below this density",
        {**row, **case, "how": "{how}"},
    )
    program.table(
        written,
        "convolution.profile",
        "convolution: milliseconds of each pass alone, and of a step",
        {
            **case,
            **density,
            **{name: passing(name) for name in PASSES},
            "together": lambda line: f"{sum(line['milliseconds'][name] for name in PASSES):.2f}",
            "a step": passing("step"),
        },
    )
    program.targets(written, "convolution", {**row, **case, **density, "times as fast": program.TIMES})
