"""Ways to rewire beside one another on extremely sparse networks: CTRE against SET, RigL and GSE, in pairs.

The setting is that of Atashgahi et al. 2022 (arXiv 1903.07138): three hidden layers of 1000 with ReLU, momentum 0.9 (Nesterov),
learning rate 0.01, weight decay 1e-4, batches of 100, a fifth of the connections moved after every epoch. Each epoch is scored
on a tenth of the training data before its connections move; the best one is read on the test set, once. Trainings of one seed
share their first network and the order of their batches, so only the way to rewire differs. Weights begin uniform in the
sparse fan-in, biases and new connections at zero.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from noctule.core.convert import convert_
from noctule.core.method import Method, attach
from noctule.core.optim import param_groups
from noctule.data import Batches, Dataset, Splits, load, standardize
from noctule.measure import Progress
from noctule.measure.paired import interval
from noctule.models import mlp
from noctule.sparse.layers import FuseEpilogue, SparseLayer, ToSparse
from noctule.sparse.rewire import MostAlike, Rewire, ctre, gse, rigl, set_, steepest
from noctule.train.fit import evaluate
from noctule_bench import program

BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, FRACTION = 100, 0.01, 0.9, 1e-4, 0.2
PATIENCE = 0.08
"""Of the epochs: the authors wait 40 of 500."""
EPOCHS = {"fashion-mnist": 30, "madelon": 500}
"""Of a training, unless given; the authors train for 500 everywhere."""
PIXELS = ("fashion-mnist", "mnist")
"""Data that lie in [0, 1] already, as in the authors' code; the others are standardized."""


@dataclass(frozen=True)
class Schedule:
    """What the ways to rewire need to know of a training."""

    every: int
    """Steps of an epoch."""
    epochs: int
    patience: int
    seed: int
    last: SparseLayer
    """The last layer: the authors compare its probabilities."""

    def activation(self, layer: SparseLayer, y_OB: Tensor) -> Tensor:
        """What is compared: hidden activations are fused into their layers."""
        return y_OB.softmax(0) if layer is self.last else y_OB

    def ctre(self, **options: Any) -> Rewire:
        """CTRE once an epoch."""
        return ctre(patience=self.patience, activation=self.activation, **self.common, **options)

    @property
    def common(self) -> dict[str, Any]:
        """The same for all that rewire once an epoch."""
        return {"every": self.every, "fraction": FRACTION, "seed": self.seed}


METHODS: dict[str, Callable[[Schedule], Rewire]] = {
    "set": lambda s: set_(**s.common),
    "rigl": lambda s: Rewire(grow=steepest, **s.common),
    "rigl-own-schedule": lambda s: rigl(until=max(1, s.every * s.epochs * 3 // 4), every=100, seed=s.seed),
    "gse": lambda s: gse(**s.common),
    "ctre-seq": lambda s: s.ctre(mode="seq", exact=True),
    "ctre-sim": lambda s: s.ctre(mode="sim", exact=True),
    "ctre-seq-sampled": lambda s: s.ctre(mode="seq", exact=False),
    "ctre-sim-sampled": lambda s: s.ctre(mode="sim", exact=False),
    "ctre-seq-sampled-64": lambda s: s.ctre(mode="seq", exact=False, candidates=64.0),
    "ctre-sim-sampled-64": lambda s: s.ctre(mode="sim", exact=False, candidates=64.0),
    "ctre-seq-sampled-1": lambda s: s.ctre(mode="seq", exact=False, candidates=1.0),
    "ctre-sim-sampled-1": lambda s: s.ctre(mode="sim", exact=False, candidates=1.0),
}
FORMS = tuple((f"ctre-{mode}", f"ctre-{mode}-sampled{many}") for many in ("", "-64", "-1") for mode in ("seq", "sim"))
"""The exact and the sampled form of the same growth, which looks at 256 candidates for each weight, or at 64 or one."""


def rewiring(
    *,
    data: tuple[str, ...] = tuple(EPOCHS),
    data_dir: Path | None = None,
    densities: tuple[float, ...] = (0.01,),
    epsilons: tuple[float, ...] = (1.0,),
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    epochs: int | None = None,
    patience: int | None = None,
    hidden: tuple[int, ...] = (1000, 1000, 1000),
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Compare CTRE with SET, RigL and GSE on extremely sparse networks, in pairs of equal seeds.

    All rewire once an epoch, but rigl-own-schedule, which does so every 100 steps, less and less, for three quarters of the
    training. Trainings that are in the output file already are not made again, so a stopped benchmark goes on where it was,
    and several processes may share the work between them by data set.

    Args:
        data: data sets.
        data_dir: where data sets are looked for first.
        densities: shares of all places, each a network.
        epsilons: in epsilon (O + I) weights for each layer, each a network too.
        methods: set, rigl, rigl-own-schedule, gse, ctre-seq, ctre-sim, ctre-seq-sampled, ctre-sim-sampled,
            and these with -64 and -1: candidates for each weight (default: all).
        seeds: one training of each method for each.
        epochs: of each training (default: 500 on Madelon, 30 on Fashion-MNIST, 100 on others).
        patience: epochs without a better validation score after which ctre-seq is random (default: 8 % of the epochs).
        hidden: widths of the hidden layers.
        threads: of each training.
        out: a file that the lines are appended to.
    """
    program.at_least_one(threads=threads, seeds=len(seeds), data=len(data))
    program.at_least_one(**{k: v for k, v in {"epochs": epochs, "patience": patience}.items() if v is not None})
    chosen = program.chosen(methods, list(METHODS))
    sparsities = [ToSparse(density=d) for d in densities] + [ToSparse(epsilon=e) for e in epsilons]
    program.at_least_one(densities=len(sparsities))
    torch.set_num_threads(threads)
    lines, found = program.Lines(out), {_key(line): line for line in program.read(out, "rewiring")}
    cells = []
    for name in data:
        length = epochs or EPOCHS.get(name, 100)
        wait = patience or max(1, round(PATIENCE * length))
        common = {"data": name, "hidden": list(hidden), "epochs": length, "patience": wait}
        cells += [(sparse, {**common, "sparsity": _text(sparse)}) for sparse in sparsities]
    for seed in seeds:
        for sparse, cell in cells:
            todo = [m for m in chosen if _key({**cell, "method": m, "seed": seed}) not in found]
            if not todo:
                continue
            splits = load(cell["data"], data_dir=data_dir, seed=seed)
            splits = splits if cell["data"] in PIXELS else standardize(splits)
            for method in todo:
                result = _train(splits, sparse, method, seed, hidden, cell["epochs"], cell["patience"])
                line = lines.write("rewiring", **cell, method=method, seed=seed, **result)
                found[_key(line)] = line
    _show(lines, [cell for _, cell in cells], chosen, seeds, found)


class _Epochs(Method):
    """Scores every epoch, keeps the best network and tells the growers; attached after `Rewire`, it comes before the moves."""

    def __init__(self, validation: Dataset, every: int, rewire: Rewire) -> None:
        self.validation, self.every, self.rewire, self.steps = validation, every, rewire, 0
        self.accuracy: list[float] = []
        self.best_epoch, self.best_state = 0, {}
        self.random_from: int | None = None

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model = model

    def after_step(self) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        accuracy = evaluate(self._model, self.validation)[1]
        if accuracy > max(self.accuracy, default=-1.0):
            self.best_epoch = len(self.accuracy) + 1
            self.best_state = copy.deepcopy(self._model.state_dict())
        self.accuracy.append(accuracy)
        self.rewire.observe(validation_accuracy=accuracy)
        if self.random_from is None and isinstance(self.rewire.grow, MostAlike) and self.rewire.grow.random:
            self.random_from = len(self.accuracy)


def _train(
    splits: Splits, sparse: ToSparse, method: str, seed: int, hidden: Sequence[int], epochs: int, patience: int
) -> dict[str, Any]:
    batches = Batches(splits.train, BATCH, seed=seed)
    torch.manual_seed(seed)
    model: nn.Module = mlp(splits.train.features, *hidden, splits.train.classes)
    model = convert_(convert_(model, sparse).model, FuseEpilogue()).model
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLayer)]
    for layer in layers:
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    groups = param_groups(model, weight_decay=WEIGHT_DECAY)
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True, fused=True)
    rewire = METHODS[method](Schedule(len(batches), epochs, patience, seed, layers[-1]))
    assert splits.validation is not None
    scores = _Epochs(splits.validation, len(batches), rewire)
    started = time.perf_counter()
    label = f"{splits.train.name}, {_text(sparse)}, {method}, seed {seed}"
    with Progress(epochs, label=label, unit="epochs") as progress, attach(model, optimizer, rewire, scores):
        for epoch in range(epochs):
            for inputs, targets in batches.epoch(epoch):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            progress.advance(note=f"validation {scores.accuracy[-1]:.4f}")
    model.load_state_dict(scores.best_state)
    return {
        "weights": sum(layer.weights for layer in layers),
        "accuracy": evaluate(model, splits.test)[1],
        "validation_accuracy": max(scores.accuracy),
        "best_epoch": scores.best_epoch,
        "random_from": scores.random_from,
        "moved": rewire.moved,
        "seconds": round(time.perf_counter() - started, 1),
        "validation_curve": [round(a, 4) for a in scores.accuracy],
    }


def _show(
    lines: program.Lines,
    cells: Sequence[dict[str, Any]],
    methods: Sequence[str],
    seeds: Sequence[int],
    found: dict[Any, dict[str, Any]],
) -> None:
    """One table of means and paired differences; then whether the exact and the sampled form agree."""
    rows, agreements = [], []
    for cell in cells:
        accuracy = {m: [found[_key({**cell, "method": m, "seed": s})]["accuracy"] for s in seeds] for m in methods}
        weights = found[_key({**cell, "method": methods[0], "seed": seeds[0]})]["weights"]

        def against(method: str, other: str, accuracy: dict[str, list[float]] = accuracy) -> dict[str, Any] | None:
            if method == other or other not in accuracy:
                return None
            return interval(list(zip(accuracy[method], accuracy[other], strict=True)))

        for method in methods:
            line = lines.write(
                "rewiring.row",
                **cell,
                weights=weights,
                method=method,
                accuracy=statistics.fmean(accuracy[method]),
                seeds=list(seeds),
                against={other: against(method, other) for other in ("set", "rigl")},
            )
            differences = [_points(line["against"][other]) for other in ("set", "rigl")]
            place = (cell["data"], cell["sparsity"], f"{weights:,}", str(cell["epochs"]))
            rows.append((method, *place, f"{100 * line['accuracy']:.2f} %", *differences))
        for exact, sampled in FORMS:
            if sampled in accuracy and (difference := against(sampled, exact)):
                bounds = difference["interval_points"]
                holds = bounds[0] <= 0.0 <= bounds[1] if bounds else None
                line = lines.write("rewiring.agreement", **cell, row=f"{sampled} - {exact}", holds=holds, **difference)
                agree = {True: "yes", False: "NO", None: "too few seeds"}[holds]
                agreements.append((line["row"], cell["data"], cell["sparsity"], _points(difference), agree))
    program.show(
        f"rewiring: accuracy on the test set, means of {len(seeds)} seeds; differences in points, 95 % intervals",
        ("method", "data", "sparsity", "weights", "epochs", "accuracy", "- set", "- rigl"),
        rows,
    )
    program.show("exact and sampled forms", ("what", "data", "sparsity", "points", "agree"), agreements)


def _points(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    bounds = difference["interval_points"]
    return f"{difference['difference_points']:+.2f}" + (" [{:+.2f}, {:+.2f}]".format(*bounds) if bounds else "")


def _text(sparse: ToSparse) -> str:
    return f"density {sparse.density:g}" if sparse.density is not None else f"epsilon {sparse.epsilon:g}"


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    patience = line["patience"] if line["method"].startswith("ctre-seq") else None
    return *(line[name] for name in ("data", "sparsity", "epochs", "method", "seed")), *line["hidden"], patience
