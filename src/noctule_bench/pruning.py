"""Ways to remove connections beside one another and beside the dense network, in pairs of equal seeds.

A small convolutional network (two convolutions and two linear layers, as LeNet) is trained for as many epochs by each, with AdamW.
The learning rate falls along a cosine, which begins anew, after a short rise, where the paper's does: EarlyCroP's after the crop
(theirs trains on for all epochs once more, here for what is left of them), Sup-tickets' in each cycle. Trainings of one seed share
their first weights, or for the sparse ones their places too, and the order of their batches. The last state is read on the test
set, once, after it was made truly sparse. The cost is said in two ways: epochs times the share of the weights that are there, which
a sparse product could be billed, and processor seconds as they were.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from noctule.compress.prune import (
    SCL,
    EarlyCroP,
    GaP,
    Globally,
    SupTickets,
    gradual_magnitude,
    sparsify_,
    sup_tickets,
)
from noctule.core.convert import convert_
from noctule.core.errors import UsageError
from noctule.core.method import Method, attach
from noctule.core.optim import param_groups
from noctule.data import Batches, Splits, load
from noctule.measure import Progress
from noctule.measure.paired import interval
from noctule.sparse.layers import SparseLayer, ToSparse
from noctule.sparse.rewire import rigl
from noctule.train.fit import evaluate
from noctule_bench import program

BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 0.005, 0.01
TICKETS, MOVED = (0.05, 0.6), 0.1
"""Sup-tickets: rates at the ends and in the middle of a cycle, over the highest, and the share of the connections that moves at
its start. The paper's 0.01, 0.05 and a half are for SGD and cycles of 3,000 steps; in 80 steps of AdamW they cost 2.4 points."""
WITHIN = {0.1: 1.0, 0.02: 2.0}
"""Density -> how many points below the dense network are allowed: to every method at 10 %, to the best at 2 %."""


@dataclass(frozen=True)
class Setting:
    """What the methods need to know of a training."""

    density: float
    epochs: int
    steps: int
    """Of the whole training."""
    batches: Batches
    seed: int
    penalty: float

    @property
    def an_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.batches)

    @property
    def ramp(self) -> dict[str, int]:
        """Removals begin after a tenth of the training, end after half, and there are 30."""
        every = max(1, round(self.steps * 0.4) // 30)
        return {"start": self.steps // 10, "until": max(self.steps // 10 + 1, self.steps // 2), "every": every}

    @property
    def cycles(self) -> dict[str, int]:
        """Three cycles, each a twentieth of the training."""
        every = max(1, self.steps // 40)
        return {"cycle": 2 * every, "start": max(1, self.steps // every - 6) * every, "every": every}


def _gap(s: Setting) -> list[Method]:
    """Six turns in two thirds of the training."""
    every = max(1, s.steps // 9)
    return [GaP(density=s.density, every=every, partitions=3, rounds=2, pattern=Globally())]


def _early(s: Setting) -> list[Method]:
    some = list(islice(s.batches.epoch(0), 5))
    every = max(1, s.an_epoch // 4)  # short epochs: so few of large ones would leave no time after the crop
    latest = max(1, s.steps // 7)
    return [EarlyCroP(density=s.density, loss_fn=F.cross_entropy, batches=some, every=every, latest=latest)]


METHODS: dict[str, Callable[[Setting], list[Method]]] = {
    "dense": lambda s: [],
    "gradual": lambda s: [gradual_magnitude(density=s.density, pattern=Globally(), **s.ramp)],
    "gap": _gap,
    "early-crop": _early,
    "rigl": lambda s: [rigl(until=max(1, s.steps * 3 // 4), every=max(1, s.steps // 40), seed=s.seed)],
    "sup-tickets": lambda s: [*sup_tickets(fraction=MOVED, seed=s.seed, **s.cycles)],
    "scl": lambda s: [
        SCL(penalty=s.penalty, start=s.steps // 10, until=s.steps // 10 + max(1, s.steps * 3 // 10), rate=17 / s.steps)
    ],
    "gradual-scl": lambda s: [gradual_magnitude(density=s.density, pattern=Globally(), **s.ramp)],
}
SPARSE = ("rigl", "sup-tickets")
"""Methods whose networks are sparse from the first step on."""
FREE = ("dense", "scl", "gradual-scl")
"""Methods without a density of their own; the last takes the one that scl found."""


def pruning(
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    densities: tuple[float, ...] = (0.1, 0.02),
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 3,
    channels: tuple[int, ...] = (16, 32),
    hidden: int = 1024,
    penalty: float = 0.3,
    samples: int | None = None,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Compare ways to remove connections of a small convolutional network, with the dense network, in pairs of equal seeds.

    Trainings that are in the output file already are not made again, so a stopped benchmark goes on where it was.

    Args:
        data: a data set of images.
        data_dir: where data sets are looked for first.
        densities: shares of the weights that are kept, for the methods that are given one.
        methods: dense, gradual, gap, early-crop, rigl, sup-tickets, scl, gradual-scl (default: all).
        seeds: one training of each method for each.
        epochs: of each training.
        channels: of the two convolutions.
        hidden: neurons between them and the classes.
        penalty: of scl.
        samples: so many training samples (default: all).
        threads: of each training.
        out: a file that the lines are appended to.
    """
    program.at_least_one(threads=threads, seeds=len(seeds), epochs=epochs, densities=len(densities))
    if len(channels) != 2:
        raise UsageError(f"the network has two convolutions: give --channels two numbers, not {len(channels)}")
    chosen = program.chosen(methods, list(METHODS))
    if "gradual-scl" in chosen and "scl" not in chosen:
        chosen.insert(0, "scl")
    torch.set_num_threads(threads)
    lines, found = program.Lines(out), {_key(line): line for line in program.read(out, "pruning")}
    about = {
        "data": data,
        "samples": samples,
        "channels": list(channels),
        "hidden": hidden,
        "epochs": epochs,
    }
    for seed in seeds:
        splits = load(data, data_dir=data_dir, seed=seed)
        if samples is not None:
            few = splits.train
            splits = replace(splits, train=replace(few, inputs=few.inputs[:samples], targets=few.targets[:samples]))
        for method in chosen:
            for density in (None,) if method in FREE else densities:
                cell = {**about, "method": method, "density": density, "seed": seed}
                cell |= {"penalty": penalty if method in ("scl", "gradual-scl") else None}
                if _key(cell) not in found:
                    goal = density or found.get(_key({**cell, "method": "scl"}), {}).get("kept", 1.0)
                    line = lines.write("pruning", **cell, **_train(splits, method, goal, seed, about, penalty))
                    found[_key(line)] = line
    _show(lines, about, chosen, densities, seeds, penalty, found)


class _Cost(Method):
    """Adds up the share of the weights that take part in each step."""

    def __init__(self) -> None:
        self.sum = 0.0

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model = model

    def before_step(self) -> None:
        self.sum += _weights(self._model)[2]


def _train(
    splits: Splits, method: str, density: float, seed: int, about: dict[str, Any], penalty: float
) -> dict[str, Any]:
    epochs = about["epochs"]
    batches = Batches(splits.train, BATCH, seed=seed, drop_last=True)
    setting = Setting(density, epochs, epochs * len(batches), batches, seed, penalty)
    torch.manual_seed(seed)
    model: nn.Module = _network(splits.train.image_shape, splits.train.classes, about["channels"], about["hidden"])
    if method in SPARSE:
        model = convert_(model, ToSparse(density=density)).model
    optimizer = AdamW(param_groups(model, weight_decay=WEIGHT_DECAY), lr=LEARNING_RATE)
    own, cost = METHODS[method](setting), _Cost()
    scheduler = LambdaLR(optimizer, _rate(setting, own))
    started = time.process_time()
    label = f"{method} {density:g}, seed {seed}"
    with Progress(epochs, label=label, unit="epochs") as progress, attach(model, optimizer, cost, *own):
        for epoch in range(epochs):
            model.train()
            for inputs, targets in batches.epoch(epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                scheduler.step()
            progress.advance()
    for tickets in own:
        if isinstance(tickets, SupTickets):
            tickets.superpose_(model)
            update_bn(batches.epoch(epochs), model)
    seconds = time.process_time() - started
    if method not in ("dense", *SPARSE):
        sparsify_(model, below=1.0)
    weights, places, kept = _weights(model)
    crops = [method.pruned_at for method in own if isinstance(method, EarlyCroP) and method.pruned_at]
    return {
        "accuracy": evaluate(model, splits.test)[1],
        "weights": weights,
        "places": places,
        "kept": kept,
        "cost_epochs": cost.sum / len(batches),
        "cpu_seconds": round(seconds, 1),
        "pruned_after_epochs": crops[0] / len(batches) if crops else None,
    }


def _network(shape: tuple[int, int, int], classes: int, channels: Sequence[int], hidden: int) -> nn.Sequential:
    """Two convolutions, each of which halves the image, and two linear layers."""
    first, second = channels
    return nn.Sequential(
        *(nn.Unflatten(1, shape), nn.BatchNorm2d(shape[0], affine=False)),
        *(nn.Conv2d(shape[0], first, 5, stride=2, padding=2), nn.ReLU(), nn.BatchNorm2d(first)),
        *(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU(), nn.BatchNorm2d(second), nn.Flatten()),
        *(nn.Linear(second * -(-shape[1] // 4) * -(-shape[2] // 4), hidden), nn.ReLU()),
        nn.Linear(hidden, classes),
    )


def _rate(setting: Setting, methods: Sequence[Method]) -> Callable[[int], float]:
    """Down a cosine to a hundredth, once more after a crop; with tickets up and down again in each cycle."""

    def rate(step: int) -> float:
        begin, end = 0, setting.steps
        for method in methods:
            if isinstance(method, EarlyCroP) and method.pruned_at is not None:
                begin = method.pruned_at
            if isinstance(method, SupTickets):
                end = method.start
                if step >= end:
                    at = (step - end) % method.cycle / method.cycle
                    return TICKETS[0] + (TICKETS[1] - TICKETS[0]) * (1 - abs(2 * at - 1))
        at = (step - begin) / max(end - begin, 1)
        return min(1.0, 0.1 + 9 * at if begin else 1.0) * (0.01 + 0.99 * (1 + cos(pi * min(at, 1.0))) / 2)

    return rate


def _weights(model: nn.Module) -> tuple[int, int, float]:
    """Weights that are there, places, and the share."""
    there = places = 0
    for module in model.modules():
        if isinstance(module, SparseLayer):
            there, places = there + module.weights, places + module.topology.places
        elif isinstance(module, nn.Linear | nn.Conv2d):
            there, places = there + int(module.weight.count_nonzero()), places + module.weight.numel()
    return there, places, there / places


def _show(
    lines: program.Lines,
    about: dict[str, Any],
    methods: Sequence[str],
    densities: Sequence[float],
    seeds: Sequence[int],
    penalty: float,
    found: dict[Any, dict[str, Any]],
) -> None:
    def of(method: str, density: float | None) -> list[dict[str, Any]]:
        cell = {**about, "method": method, "density": None if method in FREE else density}
        cell |= {"penalty": penalty if method in ("scl", "gradual-scl") else None}
        return [found[key] for s in seeds if (key := _key({**cell, "seed": s})) in found]

    def against(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any] | None:
        same = not other or len(own) != len(other) or own[0]["method"] == other[0]["method"]
        return None if same else interval([(a["accuracy"], b["accuracy"]) for a, b in zip(own, other, strict=True)])

    rows, targets = [], []
    for density in (None, *densities):
        below = {}
        for method in methods:
            if (method in FREE) != (density is None):
                continue
            own = of(method, density)
            differences = {
                "dense": against(own, of("dense", None)),
                "gradual": against(own, of("gradual-scl" if method == "scl" else "gradual", density)),
            }
            line = lines.write(
                "pruning.row",
                **about,
                method=method,
                density=density,
                against=differences,
                **{
                    k: statistics.fmean(x[k] for x in own)
                    for k in ("accuracy", "kept", "weights", "cost_epochs", "cpu_seconds")
                },
            )
            below[method] = differences["dense"]
            numbers = (f"{line['kept']:.2%}", f"{100 * line['accuracy']:.2f} %", *map(_points, differences.values()))
            rows.append((method, *numbers, f"{line['cost_epochs']:.2f}", f"{line['cpu_seconds']:.0f}"))
        points = [x["difference_points"] for x in below.values() if x]
        if density in WITHIN and points:
            worst, allowed = (min(points) if density > 0.05 else max(points)), -WITHIN[density]
            what = f"{'every' if density > 0.05 else 'the best'} method at {density:.0%}, points"
            targets.append((what, worst, allowed))
    program.show(
        f"pruning: means of {len(seeds)} seeds, {about['epochs']} epochs each; differences in points, 95 % intervals",
        ("method", "kept", "accuracy", "- dense", "- gradual", "cost, epochs", "CPU s"),
        rows,
    )
    written = [
        lines.write("pruning.target", row=what, found=value, target=least, holds=value >= least)
        for what, value, least in targets
    ]
    program.show(
        "pruning: targets",
        ("what", "found", "target", "holds"),
        [(t["row"], f"{t['found']:+.2f}", f"{t['target']:+g}", "yes" if t["holds"] else "NO") for t in written],
    )


def _points(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    bounds = difference["interval_points"]
    return f"{difference['difference_points']:+.2f}" + (" [{:+.2f}, {:+.2f}]".format(*bounds) if bounds else "")


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    names = ("data", "samples", "hidden", "epochs", "method", "density", "seed", "penalty")
    return *(line[name] for name in names), *line["channels"]
