"""The search: each change is trained on with the source as its teacher, written in each precision, and measured as a file."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from noctule.compress.distill import Stored, distilling, hinton, outputs_of
from noctule.core.errors import ExportError, NoctuleError, UsageError
from noctule.core.method import Method
from noctule.core.place import nearest as near
from noctule.data import Dataset
from noctule.deploy import Card, card_of, export
from noctule.deploy.target import needed
from noctule.deploy.targets import named
from noctule.recipes.own_data import keep_preparation
from noctule.report.files import read_object
from noctule.shrinking.candidates import PRECISIONS, Candidate, Change, Reasons, changes_for, hopeless
from noctule.shrinking.folder import Asked, Folder
from noctule.shrinking.front import Bound, choose, nearest
from noctule.shrinking.page import write_page
from noctule.shrinking.source import Source, train

CALIBRATED, TAUGHT, TEMPERATURE, MARGIN = 512, 0.7, 4.0, 2.0
"""Samples that ranges of activations are taken from; share of the teacher in the loss and its temperature (Hinton, Vinyals, Dean
2015, arXiv 1503.02531); and points of accuracy that training after the first epoch may bring."""


def search(
    asked: Asked,
    source: Callable[[], Source],
    out: Path,
    *,
    only: str | None = None,
    changes: Sequence[Change] | None = None,
    seconds: float = 1.0,
    say: Callable[[str], None] = print,
) -> Candidate:
    """Try all candidates, or go on where a search in this folder was stopped, and return the chosen one.

    Args:
        asked: the command.
        source: makes the model with its data; it is trained here where it is not yet.
        out: the folder.
        only: the name of the one candidate that is to be trained and written again, with nothing chosen.
        changes: what is tried, by default `changes_for` the source.
        seconds: for which a file is measured at each size of a batch.
        say: gets a line for each candidate.

    Raises:
        UsageError: an option, a target, the folder or the name of a candidate is wrong.
        ExportError: the runtime is not installed, or the source cannot be written for it.
        NoctuleError: no candidate meets the targets; the nearest three are named.
    """
    bounds = [Bound.read(text) for text in asked.target]
    if not bounds or min(asked.epochs, asked.threads) < 1 or asked.teacher_epochs < 0 or asked.within < 0:
        raise UsageError("say at least one --target; --epochs and --threads are at least 1, the others not negative")
    needed(named(asked.to).module, named(asked.to).needs)
    torch.set_num_threads(asked.threads)
    made = source()
    tried = list(changes or changes_for(sparse=made.sparse, to=asked.to))
    names = [name for change in tried for name in change.names]
    if only is not None and only not in names:
        raise UsageError(f"there is no candidate {only}{near(only, names)}. Candidates: {', '.join(names)}")
    folder = Folder(out, asdict(asked))
    keep_preparation(out, made.splits)
    work = _Work(asked, made.ready(out, epochs=asked.teacher_epochs, seed=asked.seed), folder, seconds)
    by_name = {each.name: each for each in folder.candidates()}
    for change in tried:
        wanted = [name for name in change.names if name == only or (only is None and name not in by_name)]
        if wanted:
            for candidate in work.measured(change, wanted, stops=only is None):
                folder.add(candidate)
                say(_line(candidate))
        by_name = {each.name: each for each in folder.candidates()}
        if only is None and not by_name[names[0]].file:
            raise NoctuleError(f"the source cannot be written for {asked.to}: {by_name[names[0]].stopped}")
    if only is not None:
        if not by_name[only].file:
            raise NoctuleError(f"{only} cannot be had: {by_name[only].stopped}")
        say(f"file: {out / str(by_name[only].file)}")
        return by_name[only]
    origin, done = by_name[names[0]], [each for each in by_name.values() if each.file]
    chosen = choose(done, bounds, origin, within=asked.within)
    rebuild = None if chosen is None else asked.command("--only", chosen.name, "--out", f"{out}-{chosen.name}")
    tested = {} if chosen is None else work.tested(chosen, origin)
    page = write_page(folder.path, asked, list(by_name.values()), origin, chosen, rebuild, tested)
    if chosen is None:
        close = "; ".join(_line(each) for each in nearest(done, bounds, origin))
        wishes = " and ".join(
            f"{b.what} {'at least' if b.what == 'accuracy' else 'at most'} {b.limit(origin):.6g}" for b in bounds
        )
        raise NoctuleError(f"no candidate has {wishes}. The nearest: {close}. All are in {page}")
    say(f"chosen: {_line(chosen)}")
    say(f"file: {out / str(chosen.file)}")
    say(f"test part, read once: {tested['chosen']:.4f}, the source {tested['source']:.4f}")
    say(f"rebuild: {rebuild}")
    say(f"page: {page}")
    return chosen


class _Work:
    """Training, writing and measuring for one search."""

    def __init__(self, asked: Asked, source: Source, folder: Folder, seconds: float) -> None:
        self.asked, self.source, self.folder, self.seconds = asked, source, folder, seconds
        self.example = source.splits.train.inputs[:8]
        self.taught: Tensor | None = None

    def measured(self, change: Change, wanted: Sequence[str], *, stops: bool) -> list[Candidate]:
        """The candidates of a change: trained, written and measured, or with why they were not."""
        precisions = dict(zip(change.names, PRECISIONS, strict=True))
        found, taken = [Candidate(name=name, precision=precisions[name]) for name in wanted], 0.0
        try:
            model = change.cut(self.source.model, self.example)
            if change.trains:
                taken = self.train(change, model, found, stops=stops)
            model = change.finished(model)
        except _Hopeless as reasons:
            for each, why in zip(found, reasons.args, strict=True):
                each.stopped = why
            return found
        except (ExportError, ValueError, ArithmeticError) as reason:  # such as neurons that cannot go
            for each in found:
                each.stopped = str(reason)
            return found
        for each in found:
            each.epochs, each.seconds = (self.asked.epochs if change.trains else 0), taken
            try:
                self.write(each, model)
            except (ExportError, ValueError) as error:
                each.stopped = f"it cannot be written: {error}"
        return found

    def train(self, change: Change, model: nn.Module, candidates: list[Candidate], *, stops: bool) -> float:
        """Train on with the source as the teacher, and return the seconds."""
        batches, epochs = self.source.batches(self.asked.seed), self.asked.epochs
        if self.taught is None:
            self.taught = outputs_of(self.source.model, self.source.splits.train.inputs)
        stored = Stored(batches, self.taught)
        methods: list[Method] = [*change.pruning(model, steps=epochs * len(batches))]
        finished = [each for each in self.folder.candidates() if each.file]
        if stops and epochs > 1 and finished:
            sketch = change.sketch(model)
            with tempfile.TemporaryDirectory(dir=self.folder.path, prefix=".sketch") as place:
                for each in candidates:
                    card = self.card(sketch, Path(place), each, sizes=(1,))
                    each.bytes, each.latency_ms = card.bytes, card.at(1)["p50_ms"]
            methods.append(_AfterAnEpoch(hopeless(candidates, finished, margin=MARGIN), candidates))
        torch.manual_seed(self.asked.seed)
        with distilling(model, stored, _loss) as loss_fn:
            return train(model, stored, self.source.validation, epochs=epochs, loss_fn=loss_fn, methods=methods)

    def card(self, model: nn.Module, place: Path, candidate: Candidate, *, sizes: tuple[int, ...]) -> Card:
        """Write a model and measure what the file costs, with few samples in memory."""
        inputs, to = self.source.splits.train.inputs, self.asked.to
        path, batches = place / f"{candidate.name}{named(to).suffix}", list(inputs[:CALIBRATED].split(128))
        exported = export(model, self.example, path, to=to, precision=candidate.precision, batches=batches)
        seconds = self.seconds if len(sizes) > 1 else self.seconds / 4
        return card_of(exported, inputs[:64].numpy(), batch_sizes=sizes, threads=self.asked.threads, seconds=seconds)

    def accuracy(self, path: Path, part: Dataset) -> float:
        """The share of a part of the data that a file has right."""
        how: dict[str, Any] = {"batch_sizes": (1,), "threads": self.asked.threads, "seconds": 0.01}
        return card_of(path, part.inputs.numpy(), part.targets.numpy(), **how).accuracy or 0.0

    def write(self, candidate: Candidate, model: nn.Module) -> None:
        """Write the file of a candidate and note what was measured of it."""
        card = self.card(model, self.folder.path, candidate, sizes=(1, 64))
        candidate.accuracy = card.accuracy = self.accuracy(Path(card.file), self.source.validation)
        card.samples = len(self.source.validation)
        card.save()
        one, many = card.at(1), card.at(64)
        candidate.file, candidate.bytes, candidate.deflated_bytes = (
            Path(card.file).name,
            card.bytes,
            card.deflated_bytes,
        )
        candidate.latency_ms, candidate.latency_64_ms = one["p50_ms"], many.get("p50_ms")
        candidate.memory_bytes, candidate.joules = one["memory_bytes"], one["joules"]

    def tested(self, chosen: Candidate, origin: Candidate) -> dict[str, Any]:
        """Accuracy of the chosen file and of the source on the test part; what an earlier call read is not read again."""
        kept = self.folder.path / "chosen.json"
        found: dict[str, Any] = read_object(kept) if kept.exists() else {}
        if found.get("name") != chosen.name:
            found = {"name": chosen.name, "file": chosen.file}
            for what, each in (("chosen", chosen), ("source", origin)):
                found[what] = self.accuracy(self.folder.path / str(each.file), self.source.splits.test)
            self.folder.write("chosen.json", found)
        return found


class _Hopeless(Exception):
    """Why a training is not worth going on with, for each of its candidates."""


class _AfterAnEpoch(Method):
    """Ends a training after its first epoch where there are reasons."""

    def __init__(self, reasons: Reasons, candidates: Sequence[Candidate]) -> None:
        self.reasons, self.candidates, self.epochs = reasons, candidates, 0

    @override
    def observe(self, **metrics: float) -> None:
        self.epochs += 1
        if self.epochs == 1 and (why := self.reasons(metrics["validation_accuracy"])):
            for each in self.candidates:
                each.accuracy, each.epochs = metrics["validation_accuracy"], 1
            raise _Hopeless(*why)


def _loss(own: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
    return (1.0 - TAUGHT) * F.cross_entropy(own, targets) + TAUGHT * hinton(own, taught, temperature=TEMPERATURE)


def _line(each: Candidate) -> str:
    if each.stopped:
        return f"{each.name}: stopped, {each.stopped}"
    return f"{each.name}: {each.bytes:,} bytes, {each.latency_ms:.3f} ms, accuracy {each.accuracy:.4f}"
