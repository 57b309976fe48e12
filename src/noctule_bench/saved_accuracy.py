"""How good networks are that were trained on compressed activations, beside those that were not, in pairs of equal seeds.

The trainings of a seed share their first weights and the order of their batches. The rate falls along a cosine. The last weights
are scored on the test set, once.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from noctule.data import Batches, load, standardize
from noctule.measure import Progress
from noctule.measure.paired import interval
from noctule.train.fit import evaluate
from noctule_bench import program
from noctule_bench.saved_steps import network, stepper

WITHIN = {"adaptive": 0.3}
"""Points below the training without compression that are allowed."""


def compare(
    lines: program.Lines,
    rows: Sequence[str],
    *,
    data: str,
    data_dir: Path | None,
    depth: int,
    batch: int,
    k: float,
    seeds: Sequence[int],
    epochs: int,
    samples: int,
    found: Sequence[dict[str, Any]],
) -> None:
    """Train each row with each seed, but for what was found; then print means and differences."""
    cell = {"data": data, "depth": depth, "batch": batch, "epochs": epochs, "samples": samples}
    bounds_of = {row: k if row == "adaptive" else None for row in rows}
    trained = {
        (line["row"], line["seed"]): line
        for line in found
        if line["row"] in rows and {**cell, "k": bounds_of[line["row"]]}.items() <= line.items()
    }
    for seed in seeds:
        for row in rows:
            if (row, seed) not in trained:
                result = _train(row, seed, **cell, k=k, data_dir=data_dir)
                trained[row, seed] = lines.write(
                    "saved.accuracy", row=row, seed=seed, k=bounds_of[row], **cell, **result
                )
    shown, judged = [], []
    for row in rows:
        own = [trained[row, seed] for seed in seeds]
        difference = interval([(line["accuracy"], trained["off", line["seed"]]["accuracy"]) for line in own])
        bounds = difference["interval_points"]
        shown.append(
            (
                row,
                f"{fmean(line['mean_ratio'] for line in own):.2f}",
                f"{100 * fmean(line['accuracy'] for line in own):.2f} %",
                f"{difference['difference_points']:+.2f}",
                "" if bounds is None else "[{:+.2f}, {:+.2f}]".format(*bounds),
            )
        )
        if row in WITHIN:
            holds = difference["difference_points"] >= -WITHIN[row]
            judged.append(
                lines.write(
                    "saved.target",
                    row=row,
                    depth=depth,
                    what="points beside off",
                    found=difference["difference_points"],
                    target=-WITHIN[row],
                    holds=holds,
                )
            )
    title = f"saved: accuracy on the test set, ResNet-{depth}, means of {len(seeds)} seeds, and points beside off"
    program.show(title, ("row", "times fewer bytes", "accuracy", "difference", "95 % interval"), shown)
    program.targets(judged, "saved", {"row": "{row}", "depth": "{depth}", "what": "{what}", "found": "{found:+.2f}"})


def _train(
    row: str,
    seed: int,
    *,
    data: str,
    data_dir: Path | None,
    depth: int,
    batch: int,
    k: float,
    epochs: int,
    samples: int,
) -> dict[str, Any]:
    splits = standardize(load(data, data_dir=data_dir, seed=seed, validation_fraction=0.1))
    few = splits.train
    few = replace(few, inputs=few.inputs[:samples], targets=few.targets[:samples])
    batches = Batches(few, batch, seed=seed, drop_last=True)
    model = network(splits, depth, seed)
    step = stepper(row, model, k, steps=epochs * len(batches))
    ratios = []
    started = time.perf_counter()
    with Progress(epochs, label=f"{row}, seed {seed}", unit="epochs") as progress:
        for epoch in range(epochs):
            model.train()
            for inputs, targets in batches.epoch(epoch):
                kept = step(inputs, targets)
                ratios.append(kept.ratio if kept else 1.0)
            progress.advance()
    return {
        "accuracy": evaluate(model, splits.test)[1],
        "mean_ratio": fmean(ratios),
        "seconds": round(time.perf_counter() - started, 1),
    }
