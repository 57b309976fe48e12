"""What compressing saved activations saves and costs: bytes kept, peak memory in a process of its own, and the time of a step."""

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noctule.measure import interleave, ratio
from noctule.measure.memory import resident_bytes, resident_peak
from noctule.memory import Saved
from noctule_bench import program
from noctule_bench.saved_accuracy import compare
from noctule_bench.saved_steps import ROWS, prepared

TARGETS = {"8 bits": (3.8, 2.5, 1.3), "adaptive": (8.0, 3.0, 1.6)}
"""Times fewer packed bytes, times lower a peak, and times as long a step at most."""
IN_FLIGHT = 4
"""Largest activations that are there at once in a backward pass, whatever the codec: an output, its input and two gradients."""
_MAP_FROM = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # else the C library keeps freed blocks, and the peak shows it


def saved(
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    depths: tuple[int, ...] = (20, 56),
    batch: int = 128,
    warm: int = 20,
    rounds: int = 7,
    k: float = 0.02,
    rows: tuple[str, ...] = (),
    trained: int = 8,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 6,
    samples: int = 20000,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Compress the saved activations of residual networks: bytes, peak memory, seconds of a step, beside checkpointing.

    Args:
        data: a data set of images.
        data_dir: where data sets are looked for first.
        depths: of the networks.
        batch: samples of a step.
        warm: training steps in which the adaptive bounds are found; the other rows take two.
        rounds: steps that are timed, in turn.
        k: of the adaptive bounds.
        rows: what to measure, instead of all.
        trained: depth of the networks whose accuracy is compared.
        seeds: of their trainings.
        epochs: of each of them; those that are in the output file already are not made again.
        samples: of the training set, for them.
        threads: of everything.
        out: a file that the lines are appended to.
    """
    program.at_least_one(batch=batch, warm=warm, rounds=rounds, threads=threads, depths=len(depths))
    chosen = program.chosen(rows, ROWS)
    lines = program.Lines(out)
    torch.set_num_threads(threads)
    written: list[dict[str, Any]] = []
    for depth in depths:
        setting = (data, data_dir, depth, batch, warm, k)
        peaks = {row: _apart(_peak, threads, row, *setting) for row in {"off": 0, **dict.fromkeys(chosen)}}
        steps = {row: prepared(row, *setting) for row in peaks}
        kept = {row: step() for row, step in steps.items()}
        timings = interleave(steps, rounds=rounds, warmup=1)
        for row in peaks:
            written.append(
                lines.write(
                    "saved",
                    row=row,
                    depth=depth,
                    batch=batch,
                    data=data,
                    k=k,
                    threads=threads,
                    **_figures(kept[row]),
                    peak_bytes=peaks[row]["peak_bytes"],
                    floor_bytes=IN_FLIGHT * peaks["off"]["largest_bytes"],
                    times_lower=peaks["off"]["peak_bytes"] / peaks[row]["peak_bytes"],
                    timing=timings[row].as_dict(),
                    times_as_long=ratio(timings[row], timings["off"]).as_dict(),
                )
            )
    program.table(written, "saved", "saved: activations kept for the backward pass", _COLUMNS)
    _targets(lines, written)
    if seeds:
        about = {"data": data, "data_dir": data_dir, "depth": trained, "batch": batch, "k": k}
        about |= {"seeds": seeds, "epochs": epochs, "samples": samples}
        judged = [row for row in ROWS if row == "off" or (row in TARGETS and row in chosen)]
        compare(lines, judged, **about, found=program.read(out, "saved.accuracy"))


_COLUMNS: dict[str, program.Column] = {
    "row": "{row}",
    "depth": "{depth}",
    "times fewer bytes": lambda line: "-" if line["ratio"] is None else f"{line['ratio']:.2f}",
    "peak MB": lambda line: f"{line['peak_bytes'] / 1e6:.0f}",
    "floor MB": lambda line: f"{line['floor_bytes'] / 1e6:.0f}",
    "times lower": "{times_lower:.2f}",
    "ms/step": program.milliseconds(0),
    "times as long": "{times_as_long[ratio]:.2f} [{times_as_long[low]:.2f}, {times_as_long[high]:.2f}]",
}


def _figures(kept: Saved | None) -> dict[str, Any]:
    if kept is None:
        return {"ratio": None}
    return {
        "ratio": kept.ratio,
        "bytes_before": kept.bytes_before,
        "bytes_kept": kept.bytes_kept,
        "tensors": kept.tensors,
        "recomputed": kept.recomputed,
        "left": dict(kept.left),
    }


def _peak(row: str, *setting: Any) -> dict[str, int]:
    """The peak of a step over what is there before it, and the largest tensor that is saved."""
    step = prepared(row, *setting)
    gc.collect()
    before = resident_bytes() or 0
    with resident_peak() as peak:
        step()
    found = [0]

    def pack(x: Tensor) -> Tensor:
        found.append(x.nbytes)
        return x.detach()

    if row == "off":
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            step()
    return {"peak_bytes": peak.peak_bytes - before, "largest_bytes": max(found)}


def _apart(function: Callable[..., Any], threads: int, *args: Any) -> Any:
    """Call a function in a process of its own that gives freed memory back."""
    before = dict(os.environ)
    os.environ.update(_MAP_FROM, OMP_NUM_THREADS=str(threads))
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _targets(lines: program.Lines, written: list[dict[str, Any]]) -> None:
    for line in written[:]:
        for what, target, found, holds in _judged(line):
            written.append(
                lines.write(
                    "saved.target",
                    row=line["row"],
                    depth=line["depth"],
                    what=what,
                    found=found,
                    target=target,
                    holds=holds,
                )
            )
    program.targets(written, "saved", {"row": "{row}", "depth": "{depth}", "what": "{what}", "found": "{found:.2f}"})


def _judged(line: dict[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    if line["row"] not in TARGETS:
        return
    fewer, lower, longer = TARGETS[line["row"]]
    yield "times fewer bytes", fewer, line["ratio"], line["ratio"] >= fewer
    yield "times lower a peak", lower, line["times_lower"], line["times_lower"] >= lower
    found = line["times_as_long"]["ratio"]
    yield "times as long a step", longer, found, found <= longer
