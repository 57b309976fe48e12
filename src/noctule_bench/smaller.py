"""A residual network at half of its width, taught by the full one, in integers: accuracy and bytes on disk at each stage.

In each seed the full network is trained, half of its channels are removed (by magnitude), what is left learns the full one's
outputs, and batch norms are folded and layers become int8 with ranges of activations from training samples. Every stage is written
by `save_model`, built anew from what the file says, and then scored on the test set; nothing is selected by it. Bytes are those
of both files, the structure with the record of what was removed included.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noctule
from noctule.compress.distill import Stored, distilling, hinton, outputs_of
from noctule.compress.quantize import StaticInt8, calibrate, fold_batch_norms, percentile
from noctule.compress.shrink import rebuild, shrink
from noctule.core.convert import convert_
from noctule.data import Batches, Splits, load
from noctule.measure.paired import interval
from noctule.models import resnet
from noctule.recipes.training import falling_rate
from noctule.train.fit import evaluate, fit
from noctule_bench import program

STAGES = ("full", "half", "distilled", "int8")
BATCH, WEIGHT_DECAY, TEMPERATURE, CALIBRATION = 128, 0.01, 4.0, 8
FEWER_BYTES, WITHIN_POINTS = 7.0, 1.0
"""Targets of the last stage against the first."""


def smaller(
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    depth: int = 8,
    width: int = 16,
    keep: float = 0.5,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 6,
    student_epochs: int = 10,
    rate: float = 0.005,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Shrink a residual network to half of its width, distil the full one into it, quantise it, and count accuracy and bytes.

    Seeds that are in the output file already are not trained again.

    Args:
        data: a data set of images.
        data_dir: where data sets are looked for first.
        depth: of the network.
        width: channels of its first stage.
        keep: share of the channels that stay.
        seeds: one run of all stages for each.
        epochs: of the full network.
        student_epochs: of the smaller one.
        rate: learning rate of both at the start.
        threads: of everything.
        out: a file that the lines are appended to.
    """
    program.at_least_one(threads=threads, seeds=len(seeds), epochs=epochs, student_epochs=student_epochs)
    torch.set_num_threads(threads)
    lines = program.Lines(out)
    cell = {"data": data, "depth": depth, "width": width, "keep": keep, "rate": rate}
    cell |= {"epochs": epochs, "student_epochs": student_epochs}
    found = {_key(line): line for line in program.read(out, "smaller")}
    for seed in seeds:
        if _key({**cell, "seed": seed}) not in found:
            splits, started = load(data, data_dir=data_dir, seed=seed), time.process_time()
            stages = {
                name: _shipped(model, structure, splits) for name, model, structure in _stages(splits, cell, seed)
            }
            seconds = round(time.process_time() - started, 1)
            line = lines.write("smaller", **cell, seed=seed, threads=threads, stages=stages, cpu_seconds=seconds)
            found[_key(line)] = line
    _show(lines, cell, [found[_key({**cell, "seed": seed})]["stages"] for seed in seeds])


def _stages(splits: Splits, cell: dict[str, Any], seed: int) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Each stage's name, model, and structure."""
    torch.manual_seed(seed)
    train = splits.train
    structure: dict[str, Any] = {
        "shape": [*train.image_shape],
        "classes": train.classes,
        "depth": cell["depth"],
        "width": cell["width"],
        "record": [],
    }
    full, batches = _made(structure), Batches(train, BATCH, seed=seed)
    _train(full, batches, F.cross_entropy, cell["epochs"], cell["rate"])
    yield "full", full, structure

    stored = Stored(batches, outputs_of(full, train.inputs))
    student = full
    structure = {**structure, "record": shrink(student, cell["keep"], example=train.inputs[:2]).record}
    yield "half", student, structure

    with distilling(student, stored, _loss) as loss_fn:
        _train(student, stored, loss_fn, cell["student_epochs"], cell["rate"])
    yield "distilled", student, structure

    fold_batch_norms(student)
    ranges = calibrate(student, islice(batches.epoch(0), CALIBRATION), observer=percentile)
    convert_(student, StaticInt8(ranges=ranges, narrowest=1))
    yield "int8", student, {**structure, "ranges": ranges}


def _loss(own: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
    return 0.1 * F.cross_entropy(own, targets) + 0.9 * hinton(own, taught, temperature=TEMPERATURE)


def _train(model: nn.Module, batches: Any, loss_fn: Any, epochs: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    scheduler = falling_rate(optimizer, epochs * len(batches))
    fit(model, optimizer, batches, validation=None, epochs=epochs, loss_fn=loss_fn, scheduler=scheduler)
    model.eval()


def _made(structure: Mapping[str, Any]) -> nn.Module:
    """A new model of this structure; channels last, which is faster in training."""
    model = resnet(structure["shape"], structure["classes"], depth=structure["depth"], width=structure["width"])
    rebuild(model, structure["record"])
    if "ranges" in structure:
        fold_batch_norms(model.eval())
        convert_(model, StaticInt8(ranges=structure["ranges"], narrowest=1))
    return model.to(memory_format=torch.channels_last)


def _shipped(model: nn.Module, structure: dict[str, Any], splits: Splits) -> dict[str, Any]:
    """Bytes of the files of a model, and the accuracy of what they give."""
    with TemporaryDirectory() as folder:
        noctule.save_model(folder, model.state_dict(), structure)
        sizes = {path.suffix: path.stat().st_size for path in Path(folder).iterdir()}
        state, structure = noctule.load_model(folder)
    loaded = _made(structure)
    loaded.load_state_dict(state)
    return {"accuracy": evaluate(loaded, splits.test)[1], "bytes": sum(sizes.values()), "files": sizes}


def _show(lines: program.Lines, cell: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    rows = []
    for stage in STAGES:
        fewer = statistics.fmean(run["full"]["bytes"] / run[stage]["bytes"] for run in runs)
        accuracy = statistics.fmean(run[stage]["accuracy"] for run in runs)
        against = interval([(run[stage]["accuracy"], run["full"]["accuracy"]) for run in runs])
        rows.append(lines.write("smaller.row", **cell, row=stage, fewer=fewer, accuracy=accuracy, **against))
    between = lambda line: "" if (b := line["interval_points"]) is None else "[{:+.2f}, {:+.2f}]".format(*b)
    columns: dict[str, program.Column] = {
        "stage": "{row}",
        "accuracy": "{accuracy:.2%}",
        "points": "{difference_points:+.2f}",
        "95 % interval": between,
        "times fewer bytes": "{fewer:.1f}",
    }
    program.table(rows, "smaller.row", f"smaller: means of {len(runs)} seeds, against the full network", columns)
    last = rows[-1]
    for what, value, target in (
        ("times fewer bytes", last["fewer"], FEWER_BYTES),
        ("points", last["difference_points"], -WITHIN_POINTS),
    ):
        rows.append(lines.write("smaller.target", **cell, row=what, found=value, target=target, holds=value >= target))
    program.targets(rows, "smaller", {"what": "{row}", "found": "{found:.2f}"})


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(line[k] for k in ("data", "depth", "width", "keep", "rate", "epochs", "student_epochs", "seed")),)
