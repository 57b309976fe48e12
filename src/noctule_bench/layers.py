"""One linear layer, forward and all gradients, module against module: Noctule, dense layers, torch CSR, SparseLab, SparseProp."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noctule.core.errors import UsageError
from noctule.measure import ratio
from noctule.measure.break_even import break_even
from noctule.measure.turns import Turns, Workers
from noctule_bench import program
from noctule_bench.contestants import (
    BF16,
    CONTESTANTS,
    CSR,
    CSR_OWN,
    LINEAR,
    NOCTULE,
    NOCTULE_BF16,
    ONEDNN,
    SPARSELAB,
    SPARSELAB_PASSIVE,
    SPARSEPROP,
    TORCH,
    Contestant,
    worth_it,
)
from noctule_bench.layer_steps import FEATURE_MAJOR, KERNELS, ROW_MAJOR, build, build_peak, layouts_of

SIZE, BATCH = 1000, 128
"""What the targets are for."""
TARGETS = {
    ROW_MAJOR: {0.2: 3.0, 0.1: 5.5, 0.05: 9.0, 0.01: 15.0},
    FEATURE_MAJOR: {0.2: 3.5, 0.1: 6.0, 0.05: 11.0, 0.01: 25.0},
    KERNELS: {0.2: 4.0, 0.1: 7.0, 0.05: 13.0, 0.01: 35.0},
}
"""Layout -> density -> how many times as fast as `nn.Linear` in float32."""
SPARSE_TARGETS = ((1.7, (SPARSELAB, SPARSELAB_PASSIVE)), (1.7, (SPARSEPROP,)), (1.0, (CSR, CSR_OWN)))
"""How many times as fast as the fastest of these."""
LARGE_SIZE, LARGE_DENSITY, LARGE_TARGET = 16384, 0.01, 30.0
LARGE_ROWS = (NOCTULE, NOCTULE_BF16, LINEAR, ONEDNN, BF16, CSR_OWN, SPARSELAB, SPARSELAB_PASSIVE, SPARSEPROP)
PEAK_SIZE = 2048


def layers(
    *,
    threads: tuple[int, ...] = (1, 2),
    size: int = SIZE,
    batch: int = BATCH,
    densities: tuple[float, ...] = (0.2, 0.1, 0.05, 0.01),
    sweep: tuple[float, ...] = (0.9, 0.7, 0.5, 0.35, 0.02),
    large: int = LARGE_SIZE,
    rounds: int = 15,
    large_rounds: int = 3,
    block_ms: float = 40.0,
    rows: tuple[str, ...] = (),
    out: Path | None = None,
) -> None:
    """Time one linear layer, forward and the gradients of input, weight and bias, against nn.Linear and the other libraries.

    Args:
        threads: each of these in turn.
        size: features in and out.
        batch: rows of the input.
        densities: at which every row is timed.
        sweep: more densities, for noctule and the dense rows only, to find where they are equally fast.
        large: features of the large layer, which is timed at 1 % density (0: none).
        rounds: turns of each row.
        large_rounds: the same for the large layer.
        block_ms: milliseconds of calls in each turn.
        rows: names of the rows to time (default: all).
        out: a file that the lines are appended to.
    """
    program.at_least_one(size=size, batch=batch, rounds=rounds, large_rounds=large_rounds, threads=min(threads or (0,)))
    if not all(0.0 < density <= 1.0 for density in (*densities, *sweep)):
        raise UsageError(f"densities must lie in (0, 1], got {densities} and {sweep}")
    names = program.chosen(rows, list(CONTESTANTS))
    lines = program.Lines(out)
    written: list[dict[str, Any]] = []
    for number in threads:
        torch.set_num_threads(number)  # so that the lines say so
        contestants = [c for c in CONTESTANTS.values() if c.name in names and worth_it(c, number)]
        few = [c for c in contestants if c.dense or c is NOCTULE]
        with Workers(number) as workers:
            bench = _Bench(workers, lines, batch, _peak(workers, lines, rounds), written)
            speedups = {}
            for density in sorted({*densities, *sweep}, reverse=True):
                timed = contestants if density in densities else few
                speedups[density] = bench.measure(timed, size, density, rounds=rounds, block_seconds=block_ms / 1e3)
            bench.break_even(speedups, size)
            if large:
                timed = [c for c in contestants if c in LARGE_ROWS]
                bench.measure(timed, large, LARGE_DENSITY, rounds=large_rounds, block_seconds=block_ms / 1e3)
    _show(written)


@dataclass
class _Bench:
    workers: Workers
    lines: program.Lines
    batch: int
    peak_gflops: float
    written: list[dict[str, Any]]

    def write(self, name: str, **figures: Any) -> None:
        self.written.append(self.lines.write(name, threads=self.workers.threads, batch=self.batch, **figures))

    def measure(
        self, contestants: Sequence[Contestant], size: int, density: float, *, rounds: int, block_seconds: float
    ) -> dict[tuple[str, str], float]:
        """Time them all at one density; (layout, dense row) -> how many times as fast noctule is."""
        failed: dict[tuple[Contestant, str], str] = {}
        for c in contestants:
            for layout in layouts_of(c):
                try:
                    self.workers.prepare(f"{c.name}, {layout}", c.process, build, c, size, density, self.batch, layout)
                except Exception as error:  # other libraries raise anything; their row says it, ours still raises
                    if c is NOCTULE:
                        raise
                    failed[c, layout] = str(error)
        label = f"{size} x {size}, density {density:g}, {self.workers.threads} threads"
        taken = self.workers.take_turns(rounds=rounds, block_seconds=block_seconds, label=label)
        self.workers.forget()
        for c in contestants:
            for layout in layouts_of(c):
                about = {"row": c.name, "layout": layout, "features": [size, size], "density": density}
                turns = taken.get(f"{c.name}, {layout}")
                if turns is None:
                    self.write("layers", **about, error=failed.get((c, layout), "its process died"))
                else:
                    self.write("layers", **about, **self._figures(c, turns, size, density, _linear(taken, layout)))
        self._targets(taken, size, density)
        return {
            (layout, c.name): ratio(dense.timing, noctule.timing).value
            for layout in (ROW_MAJOR, FEATURE_MAJOR)
            for c in contestants
            if c.dense and (dense := taken.get(f"{c.name}, {layout}"))
            if (noctule := taken.get(f"{NOCTULE.name}, {layout}"))
        }

    def break_even(self, speedups: Mapping[float, Mapping[tuple[str, str], float]], size: int) -> None:
        """Say up to which density noctule is faster than each of the dense rows."""
        for layout, against in dict.fromkeys(key for found in speedups.values() for key in found):
            at = {d: found[layout, against] for d, found in speedups.items() if (layout, against) in found}
            density, how = break_even(at)
            self.write(
                "layers.break_even",
                layout=layout,
                features=[size, size],
                against=against,
                density=density,
                how=how,
                speedups={f"{d:g}": round(speedup, 3) for d, speedup in at.items()},
            )

    def _figures(self, c: Contestant, turns: Turns, size: int, density: float, linear: Turns | None) -> dict[str, Any]:
        """Useful flops only: of the stored weights, or of all where the row is dense."""
        weights = size * size if c.dense else round(density * size * size)
        gflops = 3 * 2 * weights * self.batch / turns.timing.median_seconds / 1e9
        return {
            "timing": turns.timing,
            "calls_per_turn": turns.calls,
            "busy_cores": round(turns.busy_cores, 3),
            "gflops": round(gflops, 2),
            "peak_share": round(gflops / self.peak_gflops, 4),
            "speedup": ratio(linear.timing, turns.timing) if linear else None,
        }

    def _targets(self, taken: Mapping[str, Turns], size: int, density: float) -> None:
        """Compare noctule with what it must beat, in the layouts for which that is fixed."""
        for layout, targets in TARGETS.items():
            noctule, linear = taken.get(f"{NOCTULE.name}, {layout}"), _linear(taken, layout)
            if noctule is None:
                continue
            at_stake = (size, self.batch) == (SIZE, BATCH) and density in targets
            target = targets[density] if at_stake else None
            if (size, density) == (LARGE_SIZE, LARGE_DENSITY):
                target = LARGE_TARGET
            if linear and target:
                self._target(layout, size, density, LINEAR.name, linear, noctule, target)
            for least, others in SPARSE_TARGETS:
                there = {c.name: found for c in others if (found := taken.get(f"{c.name}, {layout}"))}
                if there and at_stake:
                    name = min(there, key=lambda name: there[name].timing.median_seconds)
                    self._target(layout, size, density, name, there[name], noctule, least)

    def _target(
        self, layout: str, size: int, density: float, name: str, other: Turns, noctule: Turns, least: float
    ) -> None:
        speedup = ratio(other.timing, noctule.timing)
        self.write(
            "layers.target",
            row=NOCTULE.name,
            layout=layout,
            features=[size, size],
            density=density,
            against=name,
            speedup=speedup,
            target=least,
            holds=speedup.value >= least,
        )


def _linear(taken: Mapping[str, Turns], layout: str) -> Turns | None:
    """`nn.Linear` in the same layout; in row-major where it has no such layout."""
    same = f"{LINEAR.name}, {FEATURE_MAJOR if layout in (FEATURE_MAJOR, KERNELS) else ROW_MAJOR}"
    return taken.get(same)


def _peak(workers: Workers, lines: program.Lines, rounds: int) -> float:
    """GF/s of the fastest large float32 product that torch has."""
    flops = {"MKL": workers.prepare("MKL", TORCH, build_peak, "MKL", PEAK_SIZE)}
    with suppress(AttributeError):  # a torch without oneDNN's product
        flops["oneDNN"] = workers.prepare("oneDNN", TORCH, build_peak, "oneDNN", PEAK_SIZE)
    taken = workers.take_turns(rounds=min(rounds, 5), block_seconds=0.0, label="peak")
    workers.forget()
    gflops = {name: flops[name] / turns.timing.minimum / 1e9 for name, turns in taken.items()}
    best = max(gflops, key=lambda name: gflops[name])
    lines.write("layers.peak", threads=workers.threads, product=best, features=PEAK_SIZE, gflops=round(gflops[best], 1))
    return gflops[best]


def _show(written: Sequence[dict[str, Any]]) -> None:
    where: dict[str, program.Column] = {
        "layout": "{layout}",
        "threads": "{threads}",
        "features": "{features[0]}",
        "density": lambda line: f"{line['density']:g}" if line["density"] else "-",
    }
    program.table(
        written,
        "layers",
        "layers: milliseconds for forward and all gradients",
        {
            "row": "{row}",
            **where,
            "ms": program.milliseconds(3),
            "GF/s": "{gflops:.1f}",
            "of fp32 peak": "{peak_share:.0%}",
            "x nn.Linear": program.speedup,
        },
    )
    program.show_errors(written)
    program.table(
        written,
        "layers.break_even",
        "layers: noctule is faster below this density",
        {"against": "{against}", **where, "how": "{how}"},
    )
    program.targets(written, "layers", {"noctule against": "{against}", **where, "times as fast": program.TIMES})
