"""Width, augmentation, distillation and int8 together, measured on the files that ship.

The experiment of Menghani 2023, "Efficient Deep Learning: A Survey on Making Deep Learning Models Smaller, Faster, and Better",
arXiv 2106.08962 (its notebook: one seed, CIFAR-10, the test set chose the epoch; 47 times smaller for 0.24 points). Here: three
seeds, Fashion-MNIST, a validation set chooses the width, the test set is read by the files that were written, in `noctule.runtime`.
"""

import statistics
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule import runtime
from noctule.compress.distill import Stored, distilling, hinton
from noctule.compress.quantize import StaticInt8, calibrate, fold_batch_norms, percentile
from noctule.core.convert import convert_
from noctule.data import Batches, Dataset, Splits, load
from noctule.data.augment import flip, shift
from noctule.deploy.noctule_file import write_model
from noctule.measure.paired import interval
from noctule.models import cnn
from noctule.recipes.training import falling_rate
from noctule.train.fit import fit
from noctule_bench import program

ROWS = ("full", "narrow", "augmented", "distilled")
FILES = (*ROWS, "int8")
CHANNELS, BATCH, RATE, WEIGHT_DECAY, CALIBRATION = (32, 64, 128), 128, 0.003, 0.01, 1024
TARGETS = {"fewer": 30.0, "difference_points": -0.5}
"""The least times fewer bytes, and points of accuracy, of the chosen file against the full network's."""


def efficient(
    *,
    data: str = "fashion-mnist",
    seeds: tuple[int, ...] = (0, 1, 2),
    widths: tuple[float, ...] = (0.25, 0.3125),
    epochs: int = 4,
    student_epochs: int = 10,
    rows: tuple[str, ...] = ROWS,
    threads: int = 1,
    files: Path | None = None,
    out: Path | None = None,
) -> None:
    """Make a convolutional network at least 30 times smaller by width, augmentation, distillation and int8, beside the full one.

    Networks that are in the output file already are not trained again.

    Args:
        data: a data set of images.
        seeds: one run of all rows for each.
        widths: factors of the channels.
        epochs: of the full network.
        student_epochs: of the narrow ones.
        rows: of full, narrow, augmented, distilled; the last with int8, and taught by the full one.
        threads: of everything.
        files: a folder that keeps what is written; default: it goes after its test.
        out: a file that the lines are appended to.
    """
    program.at_least_one(
        threads=threads, seeds=len(seeds), epochs=epochs, student_epochs=student_epochs, widths=len(widths)
    )
    rows = tuple(program.chosen(rows, ROWS))
    torch.set_num_threads(threads)
    cell = {"data": data, "channels": [*CHANNELS], "epochs": epochs, "student_epochs": student_epochs}
    with TemporaryDirectory() as folder:
        run = _Run(program.Lines(out), cell, Path(files or folder), program.read(out, "efficient"))
        run.folder.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            _seed(run, seed, load(data, seed=seed), widths, rows)
    _show(run, seeds, widths)


class _Run:
    """What has been found so far, and how to find more."""

    def __init__(self, lines: program.Lines, cell: dict[str, Any], folder: Path, read: list[dict[str, Any]]) -> None:
        self.lines, self.cell, self.folder = lines, cell, folder
        alike = {name: {k: v for k, v in cell.items() if name != "full" or k != "student_epochs"} for name in FILES}
        self.found = {(x["seed"], x["row"], x["width"]): x for x in read if x | alike.get(x["row"], cell) == x}

    def path(self, seed: int, row: str, width: float) -> Path:
        """The file of a network."""
        epochs = self.cell["epochs" if row == "full" else "student_epochs"]
        return self.folder / f"{Path(self.cell['data']).stem}-{seed}-{row}-{width}-{epochs}.noctule"

    def write(self, seed: int, row: str, width: float, model: nn.Module, splits: Splits, seconds: float) -> None:
        """Write a model, and score what is read from the file."""
        path = self.path(seed, row, width)
        write_model(model, splits.train.inputs[:4], path)
        raw, shipped = path.read_bytes(), runtime.load(path)
        assert splits.validation is not None
        score = {"accuracy": _accuracy(shipped, splits.test), "validation": _accuracy(shipped, splits.validation)}
        sizes = {"bytes": len(raw), "deflated": len(zlib.compress(raw, 9)), "cpu_seconds": round(seconds, 1)}
        line = self.lines.write("efficient", **self.cell, seed=seed, row=row, width=width, **score, **sizes)
        self.found[seed, row, width] = line


def _seed(run: _Run, seed: int, splits: Splits, widths: tuple[float, ...], rows: Sequence[str]) -> None:
    plain = Batches(splits.train, BATCH, seed=seed)
    changed = Batches(splits.train, BATCH, seed=seed, augment=_augment)
    epochs, student_epochs = run.cell["epochs"], run.cell["student_epochs"]

    def row(name: str, width: float, batches: Any, epochs: int, teacher: Any = None) -> nn.Module | None:
        if name not in rows or ((seed, name, width) in run.found and run.path(seed, name, width).exists()):
            return None
        started = time.process_time()
        torch.manual_seed(seed)
        channels = tuple(round(width * n) for n in CHANNELS)
        model: Any = cnn(splits.train.image_shape, splits.train.classes, channels=channels)
        model = model.to(memory_format=torch.channels_last)
        _train(model, batches, epochs, teacher)
        run.write(seed, name, width, model, splits, time.process_time() - started)
        return model

    row("full", 1.0, plain, epochs)
    for width in widths:
        row("narrow", width, plain, student_epochs)
        row("augmented", width, changed, student_epochs)
        if (seed, "int8", width) in run.found:
            continue
        teacher = runtime.load(run.path(seed, "full", 1.0), max_batch=BATCH)
        taught = Stored(plain, torch.from_numpy(teacher(splits.train.inputs.numpy())))
        model = row("distilled", width, taught, student_epochs, taught)
        if model is None:
            continue
        fold_batch_norms(model)
        ranges = calibrate(model, [splits.train.inputs[:CALIBRATION]], observer=percentile)
        convert_(model, StaticInt8(ranges=ranges, narrowest=1))
        run.write(seed, "int8", width, model, splits, 0.0)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    return flip(shift(images, generator, pixels=2), generator)


def _train(model: nn.Module, batches: Any, epochs: int, teacher: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    scheduler = falling_rate(optimizer, epochs * len(batches))

    def run(loss_fn: Any) -> None:
        fit(model, optimizer, batches, validation=None, epochs=epochs, loss_fn=loss_fn, scheduler=scheduler)

    if teacher is None:
        run(F.cross_entropy)
    else:
        with distilling(model, teacher, _taught) as loss_fn:
            run(loss_fn)
    model.eval()


def _taught(own: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
    return 0.1 * F.cross_entropy(own, targets) + 0.9 * hinton(own, taught, temperature=4.0)


def _accuracy(model: runtime.Model, data: Dataset) -> float:
    return float((model(data.inputs.numpy()).argmax(1) == data.targets.numpy()).mean())


def _show(run: _Run, seeds: tuple[int, ...], widths: tuple[float, ...]) -> None:
    wanted = [("full", 1.0), *((name, w) for w in widths for name in ("narrow", "augmented", "distilled", "int8"))]
    rows = [_row(run, own, name, w) for name, w in wanted if (own := [s for s in seeds if (s, name, w) in run.found])]
    columns: dict[str, program.Column] = {
        "network": "{row}",
        "width": "{width:g}",
        "seeds": "{seeds}",
        "accuracy": "{accuracy:.2%}",
        "points": "{difference_points:+.2f}",
        "95 % interval": lambda line: "[{:+.2f}, {:+.2f}]".format(*(line["interval_points"] or (torch.nan, torch.nan))),
        "validation": "{validation_points:+.2f}",
        "bytes": "{bytes:,.0f}",
        "times fewer": "{fewer:.1f}",
    }
    program.table(rows, "efficient.row", "efficient: means of the seeds, against the full network in float32", columns)
    small = [line for line in rows if line["row"] == "int8"]
    if not small:
        return
    sound = [line for line in small if line["validation_points"] >= TARGETS["difference_points"]]
    chosen = (
        max(sound, key=lambda line: line["fewer"]) if sound else max(small, key=lambda line: line["validation_points"])
    )
    for what, target in TARGETS.items():
        line = {
            "row": f"{what}, width {chosen['width']:g}, chosen on validation",
            "found": chosen[what],
            "target": target,
        }
        rows.append(run.lines.write("efficient.target", **run.cell, **line, holds=chosen[what] >= target))
    program.targets(rows, "efficient", {"what": "{row}", "found": "{found:.2f}"})


def _row(run: _Run, seeds: Sequence[int], name: str, width: float) -> dict[str, Any]:
    pairs = [(run.found[seed, name, width], run.found[seed, "full", 1.0]) for seed in seeds]
    figures = interval([(own["accuracy"], full["accuracy"]) for own, full in pairs])
    figures["seeds"] = len(seeds)
    figures["validation_points"] = 100 * statistics.fmean(own["validation"] - full["validation"] for own, full in pairs)
    figures["accuracy"] = statistics.fmean(own["accuracy"] for own, _ in pairs)
    figures["bytes"] = statistics.fmean(own["bytes"] for own, _ in pairs)
    figures["fewer"] = statistics.fmean(full["bytes"] / own["bytes"] for own, full in pairs)
    return run.lines.write("efficient.row", **run.cell, row=name, width=width, **figures)
