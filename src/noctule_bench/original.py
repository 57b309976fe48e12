"""The original recipe at its full length, epoch by epoch: SET with All-ReLU, and with ReLU beside it.

Curci, Mocanu, Pechenizkiy 2021, arXiv 2102.01732. The schedule is fixed beforehand: learning rate, decay, dropout and the
fraction that moves stay the same from the first epoch to the last. Each epoch is scored before its connections move, as in
the authors' code.

Two of the script's rules hold on Madelon only, where noise is what a network must not learn: each step takes its decay of every
weight, not times the learning rate, and connections begin, new ones too, within He's bound for the dense fan-in. On Fashion-MNIST
the first of them costs points; decay times the learning rate and growth from zero reach what the authors' logs show.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.core.convert import convert_
from noctule.core.method import Method, attach
from noctule.core.remap import Remap
from noctule.data import Batches, Dataset, load, standardize
from noctule.measure import Progress
from noctule.measure.paired import interval
from noctule.models import mlp
from noctule.models.mlp import Activation, relu
from noctule.sparse.layers import AllReLU, FuseEpilogue, SparseLinear, ToSparse
from noctule.sparse.rewire import Rewire, anywhere, sign_split
from noctule.sparse.rewire.decay import Decay
from noctule.train.fit import evaluate
from noctule_bench import program

LAST = 10
"""Epochs in a row whose mean counts: the last ones, or the best ones on the validation part."""
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, DROPOUT, FRACTION = 0.01, 0.9, 2e-4, 0.3, 0.3


@dataclass(frozen=True)
class Task:
    """What the authors trained on, and how."""

    hidden: tuple[int, ...]
    epsilon: float
    batch: int
    slope: float
    selected: bool
    """A tenth of the training data selects the epochs; else all of it trains and the last epochs count."""
    literal: bool
    """The script's decay, first values and new values; else decay times the learning rate, and growth from zero."""
    least: float
    """Accuracy to reach with All-ReLU."""


TASKS = {
    "fashion-mnist": Task((1000, 1000, 1000), 20.0, 128, 0.6, selected=False, literal=False, least=0.906),
    "madelon": Task((400, 100, 400), 10.0, 32, 0.5, selected=True, literal=True, least=0.655),
}
ACTIVATIONS = ("all-relu", "relu")
GAIN_POINTS = 0.2


def original(
    *,
    data: tuple[str, ...] = ("fashion-mnist", "madelon"),
    data_dir: Path | None = None,
    activations: tuple[str, ...] = ACTIVATIONS,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 500,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Train the original recipe for all its epochs, with All-ReLU and with ReLU, and say what the test set says.

    Trainings that are in the output file already are not made again, so a stopped benchmark goes on where it was.

    Args:
        data: fashion-mnist, madelon.
        data_dir: where data sets are looked for first.
        activations: all-relu, relu.
        seeds: one pair of trainings for each.
        epochs: of each training.
        threads: of each training.
        out: a file that the lines are appended to.
    """
    program.at_least_one(epochs=epochs, threads=threads, seeds=len(seeds))
    names, kinds = program.chosen(data, list(TASKS)), program.chosen(activations, list(ACTIVATIONS))
    torch.set_num_threads(threads)
    found = {_key(line): line for line in program.read(out, "original") if line["epochs"] == epochs}
    lines = program.Lines(out)
    for seed in seeds:
        for name in names:
            for kind in kinds:
                if (name, kind, seed) not in found:
                    line = lines.write("original", **_train(name, data_dir, kind, seed, epochs))
                    found[name, kind, seed] = line
    judged = [judgement for name in names for judgement in _judge(lines, name, kinds, seeds, found)]
    program.show(
        f"the original recipe, {epochs} epochs",
        ("data", "what", "found", "target", "holds"),
        [
            (line["data"], line["what"], line["text"], f"{line['target']:g}", "yes" if line["holds"] else "NO")
            for line in judged
        ],
    )


class _Scores(Method):
    """Scores every epoch in evaluation mode; attached after `Rewire`, so that it comes before connections move."""

    def __init__(self, parts: dict[str, Dataset], every: int) -> None:
        self.parts, self.every, self.steps = parts, every, 0
        self.accuracy: dict[str, list[float]] = {name: [] for name in parts}

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model = model

    def after_step(self) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            for name, part in self.parts.items():
                self.accuracy[name].append(evaluate(self._model, part)[1])


class _AsDrawn(Method):
    """First values, and those of new connections, uniform within He's bound for the dense fan-in; biases begin at zero."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        for layer in model.modules():
            if isinstance(layer, SparseLinear) and layer.bias is not None:
                with torch.no_grad():
                    layer.values.copy_(self._drawn(layer, layer.weights))
                    layer.bias.zero_()

    def remapped(self, layer: nn.Module, remap: Remap) -> None:
        assert isinstance(layer, SparseLinear)
        with torch.no_grad():
            layer.values[remap.old_slot < 0] = self._drawn(layer, remap.grown)

    def _drawn(self, layer: SparseLinear, count: int) -> Tensor:
        bound = (6.0 / layer.in_features) ** 0.5
        return torch.empty(count).uniform_(-bound, bound, generator=self.generator)


def _train(name: str, data_dir: Path | None, kind: str, seed: int, epochs: int) -> dict[str, Any]:
    task = TASKS[name]
    splits = standardize(load(name, data_dir=data_dir, seed=seed))
    train, parts = splits.train, {"test": splits.test}
    assert splits.validation is not None
    if task.selected:
        parts["validation"] = splits.validation
    else:
        train = _joined(splits.train, splits.validation)
    batches = Batches(train, task.batch, seed=seed)
    torch.manual_seed(seed)
    activation: Activation = relu if kind == "relu" else lambda layer: AllReLU(task.slope, layer=layer)
    model: nn.Module = mlp(train.features, *task.hidden, train.classes, activation=activation, dropout=DROPOUT)
    model = convert_(convert_(model, ToSparse(epsilon=task.epsilon)).model, FuseEpilogue()).model
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("values"))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)
    rewire: list[Method] = [Rewire(drop=sign_split, grow=anywhere, fraction=FRACTION, every=len(batches), seed=seed)]
    if task.literal:
        rewire.insert(0, _AsDrawn(seed))
    decay = WEIGHT_DECAY if task.literal else LEARNING_RATE * WEIGHT_DECAY
    scores = _Scores(parts, len(batches))
    started = time.perf_counter()
    with (
        Progress(epochs, label=f"{name}, {kind}, seed {seed}", unit="epochs") as progress,
        attach(model, optimizer, Decay(decay), *rewire, scores),
    ):
        for epoch in range(epochs):
            for inputs, targets in batches.epoch(epoch):
                optimizer.zero_grad(set_to_none=True)
                _loss(model, inputs, targets).backward()
                optimizer.step()
            progress.advance(note=f"test {scores.accuracy['test'][-1]:.4f}")
    curve = scores.accuracy
    end = epochs
    if task.selected:
        end = max(
            range(min(LAST, epochs), epochs + 1), key=lambda end: sum(curve["validation"][max(0, end - LAST) : end])
        )
    counted = curve["test"][max(0, end - LAST) : end]
    return {
        "data": name,
        "activation": kind,
        "seed": seed,
        "epochs": epochs,
        "weights": weights,
        "accuracy": statistics.fmean(counted),
        "how": f"mean of {len(counted)} epochs up to {end}, " + ("by validation" if task.selected else "the last"),
        "best": max(curve["test"]),
        "mean_of_last": statistics.fmean(curve["test"][-LAST:]),
        "seconds": round(time.perf_counter() - started, 1),
        "test_curve": [round(a, 4) for a in curve["test"]],
    }


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), targets)


def _joined(first: Dataset, second: Dataset) -> Dataset:
    return Dataset(
        torch.cat([first.inputs, second.inputs]),
        torch.cat([first.targets, second.targets]),
        name=first.name,
        classes=first.classes,
    )


def _judge(
    lines: program.Lines, name: str, kinds: Sequence[str], seeds: Sequence[int], found: dict[Any, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Against the public figures, and All-ReLU against ReLU in pairs."""
    written = []
    if "all-relu" in kinds:
        accuracy = statistics.fmean(found[name, "all-relu", seed]["accuracy"] for seed in seeds)
        how, least = (
            found[name, "all-relu", seeds[0]]["how"] if len(seeds) == 1 else "mean of the seeds",
            TASKS[name].least,
        )
        text, holds = f"{accuracy:.4f}", accuracy >= least
        written.append(
            lines.write("original.target", data=name, what=f"All-ReLU, {how}", text=text, target=least, holds=holds)
        )
    if set(kinds) == set(ACTIVATIONS):
        pairs = [tuple(found[name, kind, seed]["accuracy"] for kind in ACTIVATIONS) for seed in seeds]
        points = interval(pairs)
        holds = points["difference_points"] >= GAIN_POINTS
        text = f"{points['difference_points']:+.2f} points {points['interval_points'] or ''}"
        written.append(
            lines.write(
                "original.target",
                data=name,
                what="All-ReLU - ReLU",
                text=text,
                target=GAIN_POINTS,
                holds=holds,
                **points,
            )
        )
    return written


def _key(line: dict[str, Any]) -> tuple[str, str, int]:
    return line["data"], line["activation"], line["seed"]
