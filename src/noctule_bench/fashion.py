"""Training seconds per epoch of a multilayer perceptron on Fashion-MNIST: Noctule, dense torch at its strongest, the peers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from noctule.measure import ratio
from noctule.measure.turns import Turns, Workers
from noctule_bench import program
from noctule_bench.contestants import worth_it
from noctule_bench.recipe import Recipe, find_data
from noctule_bench.training import ROWS, build_chunk

TARGETS = (
    (7.0, ("dense fp32",)),
    (3.0, tuple(row.name for row in ROWS.values() if row.layer.dense and row.master)),
    (2.5, ("sparselab", "sparselab, passive waiting")),
    (2.5, ("sparseprop",)),
)
"""How many times as fast as the fastest of these Noctule is to be, at the sizes that are the defaults."""


def fashion(
    *,
    threads: tuple[int, ...] = (1, 2),
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    widths: tuple[int, ...] = Recipe.widths,
    weights: int = Recipe.weights,
    batch: int = Recipe.batch,
    samples: int = Recipe.samples,
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
        samples: rows of random data.
        steps: training steps in each turn; 100 hold one rewiring each.
        rounds: turns of each row.
        rows: names of the rows to time (default: all).
        out: a file that the lines are appended to.
    """
    program.at_least_one(batch=batch, samples=samples, steps=steps, rounds=rounds, threads=min(threads or (0,)))
    names = program.chosen(rows, list(ROWS))
    recipe = find_data(Recipe(widths, weights, batch, samples=samples, data=data, data_dir=data_dir))
    about = {
        "data": recipe.data,
        "samples": recipe.samples,
        "widths": list(widths),
        "weights": weights,
        "batch": batch,
        "steps_per_epoch": -(-recipe.samples // batch),
    }
    lines = program.Lines(out)
    written: list[dict[str, Any]] = []
    for number in threads:
        torch.set_num_threads(number)  # so that the lines say so
        chosen = [ROWS[name] for name in names if worth_it(ROWS[name].layer, number)]
        failed: dict[str, str] = {}
        with Workers(number) as workers:
            for row in chosen:
                try:
                    workers.prepare(row.name, row.process, build_chunk, row, recipe, steps)
                except Exception as error:  # other libraries raise anything; their row says it, ours still raises
                    if row.process is ROWS["noctule"].process:
                        raise
                    failed[row.name] = str(error)
            taken = workers.take_turns(rounds=rounds, block_seconds=0.0, warm=False, label=f"fashion, {number} threads")
        for row in chosen:
            turns = taken.get(row.name)
            if turns is None:
                figures: dict[str, Any] = {"error": failed.get(row.name, "its process died")}
            else:
                figures = _figures(turns, steps, about["steps_per_epoch"], taken.get("dense fp32"))
            written.append(lines.write("fashion", row=row.name, threads=number, **about, **figures))
        for target in _targets(taken) if recipe.is_default else ():
            written.append(lines.write("fashion.target", row="noctule", threads=number, **about, **target))
    _show(written)


def _figures(turns: Turns, steps: int, steps_per_epoch: int, dense: Turns | None) -> dict[str, Any]:
    timing = turns.timing
    return {
        "seconds_per_epoch": timing.median_seconds / steps * steps_per_epoch,
        "extrapolated": f"{steps_per_epoch} steps from the median of {len(timing.samples)} turns of {steps} steps each",
        "timing": timing,
        "microseconds_per_step": timing.median_seconds / steps * 1e6,
        "busy_cores": round(turns.busy_cores, 3),
        "speedup": ratio(dense.timing, timing) if dense else None,
    }


def _targets(taken: Mapping[str, Turns]) -> list[dict[str, Any]]:
    """Noctule against the fastest of each group that was timed."""
    found = []
    for least, names in TARGETS if "noctule" in taken else ():
        name = min((n for n in names if n in taken), key=lambda n: taken[n].timing.median_seconds, default=None)
        if name is not None:
            speedup = ratio(taken[name].timing, taken["noctule"].timing)
            found.append({"against": name, "speedup": speedup, "target": least, "holds": speedup.value >= least})
    return found


def _show(written: Sequence[dict[str, Any]]) -> None:
    program.table(
        written,
        "fashion",
        "fashion: training seconds per epoch",
        {
            "row": "{row}",
            "threads": "{threads}",
            "s/epoch": "{seconds_per_epoch:.3f}",
            "us/step": "{microseconds_per_step:.0f}",
            "busy cores": "{busy_cores:.2f}",
            "x dense fp32": program.speedup,
        },
    )
    program.show_errors(written)
    columns = {"noctule against": "{against}", "threads": "{threads}", "times as fast": program.TIMES}
    program.targets(written, "fashion", columns)
