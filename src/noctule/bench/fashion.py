"""Training seconds per epoch of a multilayer perceptron on Fashion-MNIST: Noctule, dense torch at its strongest, the peers."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from noctule.bench import program
from noctule.bench.contestants import worth_it
from noctule.bench.training import ROWS, Recipe, build_chunk, find_data
from noctule.bench.workers import Turns, Workers
from noctule.measure import ratio

STEPS_PER_EPOCH = 469
"""Batches of 128 in 60,000 rows, what the targets are for."""
DENSE_TARGETS = {"dense fp32": 7.0}
FASTEST_DENSE_TARGET = 3.0
PEER_TARGETS = {("sparselab", "sparselab, passive waiting"): 2.5, ("sparseprop",): 2.5}


def fashion(
    *,
    threads: tuple[int, ...] = (1, 2),
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    widths: tuple[int, ...] = Recipe.widths,
    weights: int = Recipe.weights,
    batch: int = Recipe.batch,
    steps: int = 100,
    rounds: int = 10,
    rows: tuple[str, ...] = (),
    out: Path | None = None,
) -> None:
    """Time the training of 784-1000-1000-1000-10 with 125,685 weights beside its dense twin and the other sparse libraries.

    Args:
        threads: each of these in turn.
        data: a data set of as many features and classes as the widths say, or "random".
        data_dir: where data sets are looked for first.
        widths: features in, of each hidden layer, and out.
        weights: stored weights of all layers together.
        batch: rows in a training step.
        steps: training steps in each turn; 100 hold one rewiring each.
        rounds: turns of everyone.
        rows: names of the rows to time (default: all).
        out: a file that the lines are appended to.
    """
    program.at_least_one(batch=batch, steps=steps, rounds=rounds, **{"threads": min(threads or (0,))})
    names = program.chosen(rows, list(ROWS))
    recipe = Recipe(widths=widths, weights=weights, batch=batch, data=data, data_dir=data_dir)
    found, samples = find_data(recipe)
    recipe = replace(recipe, data=found)
    about = {"data": found, "samples": samples, "widths": list(widths), "weights": weights, "batch": batch}
    lines = program.Lines(out)
    written: list[dict[str, Any]] = []
    for number in threads:
        torch.set_num_threads(number)  # so that the lines say so
        everyone = [ROWS[name] for name in names if worth_it(ROWS[name].layer, number)]
        failed: dict[str, str] = {}
        with Workers(number) as workers:
            for row in everyone:
                try:
                    workers.prepare(row.name, row.process, build_chunk, row, recipe, steps)
                except Exception as error:
                    if row.process is ROWS["noctule"].process:
                        raise
                    failed[row.name] = str(error)
            taken = workers.take_turns(rounds=rounds, block_seconds=0.0, label=f"fashion, {number} threads")
        for row in everyone:
            turns = taken.get(row.name)
            figures = {"error": failed.get(row.name, "its process died")} if turns is None else _figures(turns, steps, taken)
            written.append(lines.write("fashion", row=row.name, threads=number, **about, **figures))
        for against, other, least in _to_beat(taken):
            speedup = ratio(other.timing, taken["noctule"].timing)
            written.append(
                lines.write(
                    "fashion.target",
                    row="noctule",
                    threads=number,
                    against=against,
                    speedup=speedup,
                    target=least,
                    holds=speedup.value >= least,
                )
            )
    _show(written)


def main(argv: Sequence[str] | None = None) -> int:
    """``noctule bench fashion``."""
    return program.run("fashion", fashion, argv)


def _figures(turns: Turns, steps: int, taken: Mapping[str, Turns]) -> dict[str, Any]:
    timing, dense = turns.timing, taken.get("dense fp32")
    return {
        "seconds_per_epoch": timing.median_seconds / steps * STEPS_PER_EPOCH,
        "extrapolated": f"{STEPS_PER_EPOCH} steps from the median of {len(timing.samples)} turns of {steps} steps each",
        "timing": timing,
        "microseconds_per_step": timing.median_seconds / steps * 1e6,
        "busy_cores": round(turns.busy_cores, 3),
        "speedup": ratio(dense.timing, timing) if dense else None,
    }


def _to_beat(taken: Mapping[str, Turns]) -> list[tuple[str, Turns, float]]:
    """Name, time and how many times as fast Noctule is to be."""

    def fastest(names: Sequence[str]) -> str | None:
        return min((name for name in names if name in taken), key=lambda name: taken[name].timing.median_seconds, default=None)

    if "noctule" not in taken:
        return []
    dense = [row.name for row in ROWS.values() if row.layer.dense and row.master]
    wanted = [*((name, least) for name, least in DENSE_TARGETS.items() if name in taken)]
    wanted += [(name, FASTEST_DENSE_TARGET) for name in [fastest(dense)] if name and dense != ["dense fp32"]]
    wanted += [(name, least) for names, least in PEER_TARGETS.items() if (name := fastest(names))]
    return [(name, taken[name], least) for name, least in wanted]


def _show(written: Sequence[dict[str, Any]]) -> None:
    program.show(
        "fashion: training seconds per epoch",
        ("row", "threads", "s/epoch", "us/step", "busy cores", "x dense fp32"),
        [
            (
                line["row"],
                str(line["threads"]),
                f"{line['seconds_per_epoch']:.3f}",
                f"{line['microseconds_per_step']:.0f}",
                f"{line['busy_cores']:.2f}",
                f"{line['speedup']['ratio']:.2f}" if line["speedup"] else "-",
            )
            for line in written
            if line["name"] == "fashion" and "error" not in line
        ],
    )
    program.show_errors(written)
    program.show(
        "fashion: targets",
        ("noctule against", "threads", "times as fast", "target", "holds"),
        [
            (
                line["against"],
                str(line["threads"]),
                f"{line['speedup']['ratio']:.2f} [{line['speedup']['low']:.2f}, {line['speedup']['high']:.2f}]",
                f"{line['target']:g}",
                "yes" if line["holds"] else "NO",
            )
            for line in written
            if line["name"] == "fashion.target"
        ],
    )


if __name__ == "__main__":
    sys.exit(program.as_script(main))
