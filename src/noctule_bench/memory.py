"""What a training holds in memory, indices counted: Noctule, dense torch, the peers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from noctule.measure.turns import Workers
from noctule_bench import program
from noctule_bench.contestants import worth_it
from noctule_bench.recipe import Recipe
from noctule_bench.training import ROWS, weigh

TARGET = 10.0
"""How many times fewer bytes than dense float32: weights, every index array, gradients and optimizer state."""


def memory(
    *,
    threads: int = 1,
    widths: tuple[int, ...] = Recipe.widths,
    weights: int = Recipe.weights,
    batch: int = Recipe.batch,
    steps: int = 20,
    rows: tuple[str, ...] = (),
    out: Path | None = None,
) -> None:
    """Count the bytes of weights, indices, gradients and optimizer state, and the peak of a training process.

    Args:
        threads: of each training.
        widths: features in, of each hidden layer, and out.
        weights: stored weights of all layers together.
        batch: rows in a training step.
        steps: training steps before the bytes are counted.
        rows: names of the rows to weigh (default: all).
        out: a file that the lines are appended to.
    """
    program.at_least_one(batch=batch, steps=steps, threads=threads)
    names = program.chosen(rows, list(ROWS))
    recipe = Recipe(widths, weights, batch)
    lines = program.Lines(out)
    torch.set_num_threads(threads)  # so that the lines say so
    held: dict[str, dict[str, Any]] = {}
    for row in (ROWS[name] for name in names if worth_it(ROWS[name].layer, threads)):
        with Workers(threads) as workers:  # a fresh process for each
            try:
                held[row.name] = workers.run(row.process, weigh, row, recipe, steps)
            except Exception as error:  # other libraries raise anything; their row says it, ours still raises
                if row.process is ROWS["noctule"].process:
                    raise
                held[row.name] = {"error": str(error)}
    about = {"threads": threads, "widths": list(widths), "weights": weights, "batch": batch, "steps": steps}
    dense = held.get("dense fp32")
    written = []
    for name, found in held.items():
        smaller = dense["total_bytes"] / found["total_bytes"] if dense and "error" not in found else None
        written.append(lines.write("memory", row=name, **about, **found, times_smaller=smaller))
        if name == "noctule" and smaller is not None and recipe.is_default:
            target = {"against": "dense fp32", "times_smaller": smaller, "target": TARGET, "holds": smaller >= TARGET}
            written.append(lines.write("memory.target", row=name, **about, **target))
    _show(written)


def _show(written: Sequence[dict[str, Any]]) -> None:
    def kilobytes(kind: str) -> program.Column:
        return lambda line: f"{line[f'{kind}_bytes'] / 1e3:,.0f}"

    program.table(
        written,
        "memory",
        "memory: kilobytes held after some training steps, and the peak of the process above what it held before",
        {
            "row": "{row}",
            **{kind: kilobytes(kind) for kind in ("weights", "index", "gradient", "optimizer", "total")},
            "x smaller": lambda line: f"{line['times_smaller']:.2f}" if line["times_smaller"] else "-",
            "peak above": kilobytes("peak_above"),
        },
    )
    program.show_errors(written)
    program.targets(written, "memory", {"noctule against": "{against}", "times smaller": "{times_smaller:.2f}"})
