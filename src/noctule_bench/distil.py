"""What a small network learns from a large one where few samples have labels: five losses, in pairs with the student alone.

The teacher is trained once, on all of the training data. In each seed the students share the labelled samples, their first
weights and the order of their batches; only the loss differs, and to the cross entropy of the labels it adds one term. All take the
same number of steps and the last weights are scored on the test set, once: there are no labels to select with. In the rows
that end in ``-unlabelled`` the term is taken on a second batch, of all training samples; it needs no labels of these. DKD needs a
target, FitNets and attention transfer could do the same at the cost of storing more of the teacher.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noctule.compress.distill import attention_transfer, dkd, fitnets, hinton, regressor, rkd, taps
from noctule.data import Batches, Dataset, Splits, load
from noctule.measure import Progress
from noctule.measure.paired import interval
from noctule.models import cnn
from noctule.recipes.training import falling_rate
from noctule.train.fit import evaluate, fit
from noctule_bench import program

BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 0.003, 0.01
UNLABELLED_BATCH = 128
TEACHER_BATCH, TEACHER_LEARNING_RATE = 128, 0.002
GAIN_POINTS = 0.5
"""The least that the best loss is to gain."""
Outputs = Mapping[str, Tensor]
"""By name: "" of the network itself, "stage1" and so on at the end of a stage, "embedding" before the last layer."""


@dataclass(frozen=True)
class Term:
    """What a row adds to the cross entropy."""

    loss: Callable[[Outputs, Outputs, Tensor, nn.ModuleDict], Tensor]
    """Of the student's outputs, the teacher's, the targets, and what is trained beside the student."""
    reads: tuple[str, ...]
    weight: float
    unlabelled: bool = False


def _hinton(own: Outputs, taught: Outputs, targets: Tensor, beside: nn.ModuleDict) -> Tensor:
    return hinton(own[""], taught[""], temperature=4.0)


def _dkd(own: Outputs, taught: Outputs, targets: Tensor, beside: nn.ModuleDict) -> Tensor:
    return dkd(own[""], taught[""], targets, alpha=1.0, beta=4.0, temperature=4.0)


def _fitnets(own: Outputs, taught: Outputs, targets: Tensor, beside: nn.ModuleDict) -> Tensor:
    return fitnets(own["stage2"], taught["stage2"], beside["stage2"])


def _attention(own: Outputs, taught: Outputs, targets: Tensor, beside: nn.ModuleDict) -> Tensor:
    return torch.stack([attention_transfer(own[k], taught[k]) for k in ("stage1", "stage2", "stage3")]).sum()


def _rkd(own: Outputs, taught: Outputs, targets: Tensor, beside: nn.ModuleDict) -> Tensor:
    return rkd(own["embedding"], taught["embedding"], distance=1.0, angle=2.0)


ROWS: dict[str, Term | None] = {
    "alone": None,
    "hinton": Term(_hinton, ("",), 1.0),
    "dkd": Term(_dkd, ("",), 1.0),
    "fitnets": Term(_fitnets, ("stage2",), 1.0),
    "attention": Term(_attention, ("stage1", "stage2", "stage3"), 50.0),
    "rkd": Term(_rkd, ("embedding",), 2.5),
    "hinton-unlabelled": Term(_hinton, ("",), 1.0, unlabelled=True),
    "rkd-unlabelled": Term(_rkd, ("embedding",), 2.5, unlabelled=True),
}


def distil(
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    labels: float = 0.05,
    rows: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    steps: int = 3000,
    teacher_epochs: int = 10,
    teacher: tuple[int, ...] = (32, 64, 128),
    student: tuple[int, ...] = (8, 16, 32),
    weight: float = 1.0,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Teach a small convolutional network by a large one with 5 % of the labels, by five losses, in pairs of equal seeds.

    Trainings that are in the output file already are not made again.

    Args:
        data: a data set of images.
        data_dir: where data sets are looked for first.
        labels: share of the training samples that the students know the labels of.
        rows: alone, hinton, dkd, fitnets, attention, rkd, hinton-unlabelled, rkd-unlabelled (default: all).
        seeds: one training of each row for each.
        steps: of each student.
        teacher_epochs: of the teacher.
        teacher: channels of its three stages, of two convolutions each.
        student: channels of its three stages, of one convolution each.
        weight: factor on the weights of all terms.
        threads: of each training.
        out: a file that the lines are appended to.
    """
    program.at_least_one(threads=threads, seeds=len(seeds), steps=steps, teacher_epochs=teacher_epochs)
    if not 0.0 < labels <= 1.0 or len(teacher) != 3 or len(student) != 3:
        raise program.UsageError(
            f"--labels must lie in (0, 1], --teacher and --student have three stages; got {labels}, {teacher}, {student}"
        )
    names = program.chosen(rows, list(ROWS))
    names = names if "alone" in names else ["alone", *names]
    torch.set_num_threads(threads)
    cell = {"data": data, "labels": labels, "steps": steps, "teacher": [*teacher], "student": [*student]}
    cell |= {"teacher_epochs": teacher_epochs, "weight": weight}
    lines = program.Lines(out)
    found = {_key(line): line for line in program.read(out, "distil")}
    if any(_key({**cell, "row": name, "seed": seed}) not in found for seed in seeds for name in names):
        splits = load(data, data_dir=data_dir, seed=0)
        taught = _Teacher.train(splits, teacher, teacher_epochs)
        lines.write("distil.teacher", **cell, accuracy=taught.accuracy, seconds=taught.seconds)
        for seed in seeds:
            for name in names:
                key = _key({**cell, "row": name, "seed": seed})
                if key not in found:
                    result = _train(splits, taught, ROWS[name], student, labels, steps, weight, seed, name)
                    found[key] = lines.write("distil", **cell, row=name, seed=seed, **result)
    _show(lines, cell, names, seeds, found)


@dataclass(frozen=True)
class _Teacher:
    """A trained network and how good it is."""

    model: nn.Sequential
    accuracy: float
    seconds: float

    @classmethod
    def train(cls, splits: Splits, channels: tuple[int, ...], epochs: int) -> "_Teacher":
        torch.manual_seed(0)
        model = cnn(splits.train.image_shape, splits.train.classes, channels=channels, dropout=0.2)
        batches = Batches(splits.train, TEACHER_BATCH, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        scheduler = falling_rate(optimizer, epochs * len(batches))
        fitted = fit(model, optimizer, batches, validation=splits.validation, epochs=epochs, scheduler=scheduler)
        model.load_state_dict(fitted.best_state)
        return cls(model.eval(), evaluate(model, splits.test)[1], fitted.seconds)

    def outputs(self, inputs: Tensor, reads: Sequence[str]) -> dict[str, Tensor]:
        """What the teacher has to say of each sample, by name."""
        names = _places(self.model)
        parts: list[dict[str, Tensor]] = []
        with torch.no_grad(), taps(self.model, [names[read] for read in reads]) as heard:
            for part in inputs.split(1000):
                self.model(part)
                parts.append({read: heard[names[read]] for read in reads})
        return {read: torch.cat([part[read] for part in parts]) for read in reads}


def _places(model: nn.Sequential) -> dict[str, str]:
    """Name of an output -> name of the module that returns it, in a network of `cnn`."""
    norms = [name for name, m in model.named_children() if isinstance(m, nn.BatchNorm2d)][1:]
    flat = next(name for name, m in model.named_children() if isinstance(m, nn.Flatten))
    return {"": "", "embedding": flat, **{f"stage{k}": name for k, name in enumerate(norms, 1)}}


def _train(
    splits: Splits,
    teacher: _Teacher,
    term: Term | None,
    channels: Sequence[int],
    labels: float,
    steps: int,
    weight: float,
    seed: int,
    name: str,
) -> dict[str, Any]:
    labelled = _labelled(splits.train, labels, seed)
    torch.manual_seed(seed)
    model = cnn(splits.train.image_shape, splits.train.classes, channels=channels, convolutions=1)
    places = _places(model)
    reads = term.reads if term else ()
    asked = splits.train if term and term.unlabelled else labelled
    known = teacher.outputs(asked.inputs, reads)
    beside = nn.ModuleDict()
    if term and "stage2" in reads and term.loss is _fitnets:
        with torch.no_grad(), taps(model, [places["stage2"]]) as heard:
            model.eval()(labelled.inputs[:1])
            beside["stage2"] = regressor(heard[places["stage2"]], known["stage2"][:1])
    parameters = [*model.parameters(), *beside.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = falling_rate(optimizer, steps)
    assert scheduler is not None
    rows, more = _rows(labelled, BATCH, seed), _rows(asked, UNLABELLED_BATCH, seed + 1000)
    started = time.perf_counter()
    model.train()
    with Progress(steps, label=f"{name}, seed {seed}", unit="steps") as bar, taps(model, [*places.values()]) as heard:
        for _ in range(steps):
            batch = next(rows)
            inputs, targets = labelled.inputs[batch], labelled.targets[batch]
            loss = F.cross_entropy(model(inputs), targets)
            if term:
                if term.unlabelled:
                    batch = next(more)
                    model(asked.inputs[batch])
                own = {read: heard[places[read]] for read in reads}
                taught = {read: known[read][batch] for read in reads}
                loss = loss + weight * term.weight * term.loss(own, taught, targets, beside)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            bar.advance()
    seconds = time.perf_counter() - started
    return {
        "labelled": len(labelled),
        "unlabelled": bool(term and term.unlabelled),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": evaluate(model, splits.test)[1],
        "seconds": round(seconds, 1),
    }


def _labelled(dataset: Dataset, share: float, seed: int) -> Dataset:
    """As many samples of each class."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    each = max(1, round(share * len(dataset) / dataset.classes))
    chosen = [order[dataset.targets[order] == k][:each] for k in range(dataset.classes)]
    return dataset.take(torch.cat(chosen))


def _rows(dataset: Dataset, batch: int, seed: int):
    """Row numbers of whole batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch, len(dataset))
    while True:
        yield from torch.randperm(len(dataset), generator=generator).split(size)[: len(dataset) // size]


def _show(
    lines: program.Lines,
    cell: dict[str, Any],
    names: Sequence[str],
    seeds: Sequence[int],
    found: Mapping[Any, dict[str, Any]],
) -> None:
    """One table of means and paired differences from the student alone; then whether the best gains enough."""
    accuracy = {n: [found[_key({**cell, "row": n, "seed": seed})]["accuracy"] for seed in seeds] for n in names}
    shown, gains = [], dict[str, dict[str, Any]]()
    for name in names:
        mean = statistics.fmean(accuracy[name])
        difference = interval(list(zip(accuracy[name], accuracy["alone"], strict=True)))
        line = lines.write("distil.row", **cell, row=name, accuracy=mean, seeds=[*seeds], **difference)
        bounds = line["interval_points"]
        between = "" if bounds is None else "[{:+.2f}, {:+.2f}]".format(*bounds)
        shown.append((name, f"{100 * mean:.2f} %", f"{line['difference_points']:+.2f}", between))
        if name != "alone":
            gains[name] = difference
    program.show(
        f"distil: accuracy on the test set, means of {len(seeds)} seeds, and points over the student alone",
        ("loss", "accuracy", "gain", "95 % interval"),
        shown,
    )
    if gains:
        best = max(gains, key=lambda name: gains[name]["difference_points"])
        holds = gains[best]["difference_points"] >= GAIN_POINTS
        lines.write("distil.target", **cell, row=best, target=GAIN_POINTS, holds=holds, **gains[best])


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("data", "labels", "steps", "teacher_epochs", "weight", "row", "seed")
    return *(line[name] for name in names), *line["teacher"], *line["student"]
