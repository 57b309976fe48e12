"""A residual network at half of its width, taught by the full one, in int8: accuracy and bytes on disk at each stage.

In each seed the full network is trained, half of its channels are removed by magnitude, what is left learns the full one's outputs,
batch norms are folded and layers become int8. Each stage is written by `save_model`, built anew from its two files, whose bytes are
counted, and then scored on the test set, with which nothing is selected.
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

NETWORK = {"depth": 8, "width": 16}
BATCH, RATE, WEIGHT_DECAY, CALIBRATION = 128, 0.005, 0.01, 8
TARGETS = {"fewer": 7.0, "difference_points": -1.0}
"""The least times fewer bytes, and points of accuracy, of the last stage against the first."""


def smaller(
    *,
    data: str = "fashion-mnist",
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 3,
    student_epochs: int = 5,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Shrink a ResNet-8 to half of its width, distil the full one into it, quantise it, and count accuracy and bytes.

    Seeds that are in the output file already are not trained again.

    Args:
        data: a data set of images.
        seeds: one run of all stages for each.
        epochs: of the full network.
        student_epochs: of the smaller one.
        threads: of everything.
        out: a file that the lines are appended to.
    """
    program.at_least_one(threads=threads, seeds=len(seeds), epochs=epochs, student_epochs=student_epochs)
    torch.set_num_threads(threads)
    lines, cell = program.Lines(out), {"data": data, **NETWORK, "epochs": epochs, "student_epochs": student_epochs}
    found = {line["seed"]: line for line in program.read(out, "smaller") if line | cell == line}
    for seed in seeds:
        if seed not in found:
            splits, started = load(data, seed=seed), time.process_time()
            stages = {name: _stored(model, about, splits) for name, model, about in _stages(splits, cell, seed)}
            seconds = round(time.process_time() - started, 1)
            found[seed] = lines.write("smaller", **cell, seed=seed, stages=stages, cpu_seconds=seconds)
    _show(lines, cell, [found[seed]["stages"] for seed in seeds])


def _stages(splits: Splits, cell: dict[str, Any], seed: int) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Name, model and structure of each stage; the model is the same one all the way."""
    torch.manual_seed(seed)
    train, batches = splits.train, Batches(splits.train, BATCH, seed=seed)
    about: dict[str, Any] = {"shape": [*train.image_shape], "classes": train.classes, "record": []}
    model = _built(about)
    _train(model, batches, F.cross_entropy, cell["epochs"])
    yield "full", model, about
    taught = Stored(batches, outputs_of(model, train.inputs))
    about["record"] = shrink(model, 0.5, example=train.inputs[:2]).record
    yield "half", model, about
    with distilling(model, taught, _loss) as loss_fn:
        _train(model, taught, loss_fn, cell["student_epochs"])
    yield "distilled", model, about
    fold_batch_norms(model)
    about["ranges"] = calibrate(model, islice(batches.epoch(0), CALIBRATION), observer=percentile)
    convert_(model, StaticInt8(ranges=about["ranges"], narrowest=1))
    yield "int8", model, about


def _loss(own: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
    return 0.1 * F.cross_entropy(own, targets) + 0.9 * hinton(own, taught, temperature=4.0)


def _train(model: nn.Module, batches: Any, loss_fn: Any, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    scheduler = falling_rate(optimizer, epochs * len(batches))
    fit(model, optimizer, batches, validation=None, epochs=epochs, loss_fn=loss_fn, scheduler=scheduler)
    model.eval()


def _built(about: Mapping[str, Any]) -> nn.Module:
    """A new model of this structure."""
    model: Any = resnet(about["shape"], about["classes"], **NETWORK)
    rebuild(model, about["record"])
    if "ranges" in about:
        fold_batch_norms(model.eval())
        convert_(model, StaticInt8(ranges=about["ranges"], narrowest=1))
    return model.to(memory_format=torch.channels_last)  # faster in training


def _stored(model: nn.Module, about: dict[str, Any], splits: Splits) -> dict[str, Any]:
    """Bytes of a model's files, and the accuracy of what is built from them."""
    with TemporaryDirectory() as folder:
        noctule.save_model(folder, model.state_dict(), about)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        state, about = noctule.load_model(folder)
    loaded = _built(about)
    loaded.load_state_dict(state)
    return {"accuracy": evaluate(loaded, splits.test)[1], "bytes": size}


def _show(lines: program.Lines, cell: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    rows = []
    for stage in runs[0]:
        pairs = [(run[stage], run["full"]) for run in runs]
        figures = interval([(own["accuracy"], full["accuracy"]) for own, full in pairs])
        figures["accuracy"] = statistics.fmean(own["accuracy"] for own, _ in pairs)
        figures["fewer"] = statistics.fmean(full["bytes"] / own["bytes"] for own, full in pairs)
        rows.append(lines.write("smaller.row", **cell, row=stage, **figures))
    columns: dict[str, program.Column] = {
        "stage": "{row}",
        "accuracy": "{accuracy:.2%}",
        "points": "{difference_points:+.2f}",
        "95 % interval": lambda line: "[{:+.2f}, {:+.2f}]".format(*(line["interval_points"] or (torch.nan, torch.nan))),
        "times fewer bytes": "{fewer:.1f}",
    }
    program.table(rows, "smaller.row", f"smaller: means of {len(runs)} seeds, against the full network", columns)
    last = rows[-1]
    for what, target in TARGETS.items():
        line = {"row": what, "found": last[what], "target": target, "holds": last[what] >= target}
        rows.append(lines.write("smaller.target", **cell, **line))
    program.targets(rows, "smaller", {"what": "{row}", "found": "{found:.2f}"})
