"""What removing neurons saves and costs: paired trainings without and with each way to do it, the test set read once by each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from noctule.compress.prune import SpectralPruning
from noctule.compress.shrink import ImportancePruning
from noctule.core.convert import convert_
from noctule.core.errors import UsageError
from noctule.core.method import Method
from noctule.core.optim import param_groups
from noctule.data import Batches, Splits, load, standardize
from noctule.measure import footprint, interleave, ratio
from noctule.measure.paired import interval
from noctule.models import mlp
from noctule.recipes.training import falling_rate, falling_rewire
from noctule.sparse.layers import FuseEpilogue, SparseLinear, ToSparse
from noctule.train.fit import evaluate, fit
from noctule_bench import program

WAYS = ("importance", "spectral")
WITHIN_POINTS = 0.5
STEPS_A_TURN = 20
BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 128, 0.002, 0.01, 0.15
"""Those of the default recipe of `noctule.recipes.sparse_mlp`."""


def shrinking(
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 30,
    hidden: tuple[int, ...] = (1000, 1000, 1000),
    density: float = 0.045,
    ways: tuple[str, ...] = ("importance",),
    percentile: float = 30.0,
    least: int = 1,
    removed: float = 0.5,
    first: int = 1,
    apart: int = 1,
    last: int = 4,
    skip: tuple[str, ...] = ("0",),
    rounds: int = 30,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Train the default recipe without and with removal of neurons; compare accuracy, size and the seconds of a step.

    Args:
        data: a data set.
        data_dir: where data sets are looked for first.
        seeds: one pair of trainings for each.
        epochs: of each training.
        hidden: widths of the hidden layers before.
        density: of the network before; at 1 its layers are dense, as spectral needs them.
        ways: importance, spectral.
        percentile: of the neurons of each other hidden layer that go each time.
        least: so many neurons stay in every layer.
        removed: the share of the hidden neurons that is to go, a target.
        first: the epoch after which neurons go for the first time (spectral: after the first ``apart`` epochs).
        apart: epochs from one removal to the next.
        last: no removal after a later epoch.
        skip: names of layers that keep their neurons; the first one, "0", reads the pixels, and misses them most.
        rounds: turns of 20 steps in which the trained networks are timed.
        threads: of everything.
        out: a file that the lines are appended to.
    """
    program.at_least_one(
        epochs=epochs, first=first, apart=apart, rounds=rounds, threads=threads, seeds=len(seeds), hidden=len(hidden)
    )
    lines = program.Lines(out)
    torch.set_num_threads(threads)
    about = {"data": data, "hidden": list(hidden), "density": density, "epochs": epochs, "percentile": percentile}
    about |= {"first": first, "apart": apart, "last": last, "skip": list(skip), "least": least}
    chosen = program.chosen(ways, WAYS)
    if density < 1.0 and "spectral" in chosen:
        raise UsageError(f"spectral removes neurons of dense layers: give --density 1, not {density:g}")
    written: dict[str, list[dict[str, Any]]] = {way: [] for way in chosen}
    for seed in seeds:
        splits = standardize(load(data, data_dir=data_dir, seed=seed, validation_fraction=0.1))
        an_epoch = len(Batches(splits.train, BATCH, seed=seed))
        whole = _train(splits, hidden, density, epochs, seed, [])
        for way in chosen:
            every, until = apart * an_epoch, last * an_epoch
            more = (
                SpectralPruning(
                    fraction=percentile / 100, every=every, until=until, window=min(20, every), least=least, skip=skip
                )
                if way == "spectral"
                else ImportancePruning(
                    percentile=percentile, start=first * an_epoch, every=every, until=until + 1, least=least, skip=skip
                )
            )
            less = _train(splits, hidden, density, epochs, seed, [more])
            turns = {"whole": _turn(whole, splits, seed), "less": _turn(less, splits, seed)}
            timings = interleave(turns, rounds=rounds)
            figures = {
                f"{name}_{key}": x for name, t in (("whole", whole), ("less", less)) for key, x in t.figures().items()
            }
            figures |= {f"{name}_seconds_per_step": t.median_seconds / STEPS_A_TURN for name, t in timings.items()}
            written[way].append(
                lines.write(
                    "shrinking",
                    way=way,
                    seed=seed,
                    **about,
                    **figures,
                    removed_share=1 - less.neurons / whole.neurons,
                    difference_points=100 * (less.accuracy - whole.accuracy),
                    speedup=ratio(timings["whole"], timings["less"]),
                )
            )
    for way, own in written.items():
        _show(way, own)
    targets = [
        lines.write("shrinking.target", way=way, **about, **target)
        for way, own in written.items()
        for target in _targets(own, removed)
    ]
    program.show(
        "shrinking: targets",
        ("way", "what", "found", "target", "holds"),
        [
            (t["way"], t["row"], f"{t['found']:+.3g}", f"{t['target']:+g}", "yes" if t["holds"] else "NO")
            for t in targets
        ],
    )


@dataclass(frozen=True)
class _Trained:
    """A network with what trained it, and how good it became."""

    model: nn.Module
    optimizer: Optimizer
    accuracy: float
    seconds: float

    @property
    def neurons(self) -> int:
        """In all hidden layers."""
        return sum(layer.out_features for layer in self.layers[:-1])

    @property
    def layers(self) -> list[Any]:
        """Sparse or dense ones."""
        return [m for m in self.model.modules() if isinstance(m, SparseLinear | nn.Linear)]

    def figures(self) -> dict[str, Any]:
        """As a line keeps them."""
        return {
            "accuracy": self.accuracy,
            "training_seconds": self.seconds,
            "neurons": self.neurons,
            "widths": [layer.out_features for layer in self.layers],
            "weights": sum(x.weights if isinstance(x, SparseLinear) else x.weight.numel() for x in self.layers),
            "footprint": footprint(self.model, self.optimizer, all_gradients=True),
        }


def _train(
    splits: Splits, hidden: tuple[int, ...], density: float, epochs: int, seed: int, more: list[Method]
) -> _Trained:
    """The default recipe of ``noctule run sparse_mlp``, with more methods before the one that moves connections."""
    torch.manual_seed(seed)
    model: nn.Module = mlp(splits.train.features, *hidden, splits.train.classes, dropout=DROPOUT)
    if density < 1.0:
        model = convert_(convert_(model, ToSparse(density=density)).model, FuseEpilogue()).model
    optimizer = AdamW(param_groups(model, weight_decay=WEIGHT_DECAY), lr=LEARNING_RATE, fused=True)
    batches = Batches(splits.train, BATCH, seed=seed)
    steps = epochs * len(batches)
    moving = falling_rewire("gse", fraction=0.3, every=200, steps=steps, seed=seed) if density < 1.0 else []
    fitted = fit(
        model,
        optimizer,
        batches,
        validation=splits.validation,
        epochs=epochs,
        methods=[*more, *moving],
        scheduler=falling_rate(optimizer, steps),
    )
    model.load_state_dict(fitted.best_state)
    return _Trained(model, optimizer, evaluate(model, splits.test)[1], fitted.seconds)


def _turn(trained: _Trained, splits: Splits, seed: int) -> Callable[[], None]:
    """Some training steps, always of the same batches."""
    batches = list(islice(Batches(splits.train, BATCH, seed=seed).epoch(0), STEPS_A_TURN))

    def turn() -> None:
        trained.model.train()
        for inputs, targets in batches:
            trained.optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(trained.model(inputs), targets).backward()
            trained.optimizer.step()

    return turn


def _targets(written: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    difference = interval([(line["less_accuracy"], line["whole_accuracy"]) for line in written])
    removed = min(line["removed_share"] for line in written)
    points = difference["difference_points"]
    slowest = min(line["speedup"]["low"] for line in written)
    return [
        {"row": "share of the hidden neurons removed", "found": removed, "target": share} | {"holds": removed >= share},
        {"row": "points of accuracy", "found": points, "target": -WITHIN_POINTS, "holds": points >= -WITHIN_POINTS}
        | difference,
        {"row": "times as fast a step", "found": slowest, "target": 1.0, "holds": slowest > 1.0},
    ]


def _show(way: str, written: Sequence[dict[str, Any]]) -> None:
    def both(line: dict[str, Any], key: str, scale: float = 1.0, form: str = ",.0f") -> str:
        return " -> ".join(format(line[f"{name}_{key}"] * scale, form) for name in ("whole", "less"))

    rows = []
    for line in written:
        sizes = " -> ".join(f"{line[f'{name}_footprint']['total_bytes'] / 1e6:.2f}" for name in ("whole", "less"))
        rows.append(
            (
                str(line["seed"]),
                both(line, "accuracy", form=".4f"),
                both(line, "neurons"),
                both(line, "weights"),
                sizes,
                both(line, "seconds_per_step", 1e6),
                f"{line['speedup']['ratio']:.2f}",
            )
        )
    headers = ("seed", "test accuracy", "hidden neurons", "weights", "MB in training", "us/step", "times as fast")
    program.show(f"shrinking: without -> with {way} pruning", headers, rows)
