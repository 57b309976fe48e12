"""What a file costs and how good it is, measured on the file in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import noctule
from noctule.checkpoint.atomic import replacing
from noctule.core.errors import ExportError
from noctule.deploy.exporting import Exported
from noctule.deploy.measured import resized
from noctule.deploy.prepare import answers
from noctule.deploy.target import needed
from noctule.deploy.targets import of_file
from noctule.measure import machine
from noctule.measure.energy import Meter

WATTS = 10.0
"""Of a processor core at work, where no counter of energy can be read."""
OUTPUTS_BATCH = 64


@dataclass
class Card:
    """What was measured of a file; None means "not available"."""

    file: str
    to: str
    precision: str | None = None
    fell_back: list[str] = field(default_factory=list)
    agreement: dict[str, Any] | None = None
    bytes: int = 0
    """Of the file and what belongs to it."""
    deflated_bytes: int = 0
    import_seconds: float = 0.0
    """Of the runtime."""
    load_seconds: float = 0.0
    """Of the file, by a runtime that is imported."""
    batches: list[dict[str, Any]] = field(default_factory=list)
    """For each size of a batch: calls, p50_ms, p90_ms, p99_ms of a call, cpu_seconds of a call, joules of a sample, and the peak of
    memory until then in bytes, less that of a process with numpy."""
    energy: str = ""
    """Where the joules come from."""
    samples: int | None = None
    accuracy: float | None = None
    accuracy_ratio: float | None = None
    """The file's accuracy over that of its source."""
    equal_predictions: float | None = None
    """The share of the samples for which the file and its source predict the same class."""
    fastest_precision: str | None = None
    """Of those that were measured on this machine, by `precisions_of`."""
    threads: int = 1
    torch_loaded: bool = False
    """Whether the process that ran the file needed torch."""
    flags: list[str] = field(default_factory=list)
    """What of the processor's instructions matters here."""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    def save(self, path: Path | None = None) -> Path:
        """Write the card as JSON, beside the file where no other path is given."""
        path = path or Path(self.file + ".card.json")
        with replacing(path) as file:
            file.write(json.dumps(self.as_dict(), indent=2).encode())
        return path

    def at(self, batch: int) -> dict[str, Any]:
        """What was measured with batches of a size."""
        return next(entry for entry in self.batches if entry["batch"] == batch)

    def __str__(self) -> str:
        """One screen of text."""
        lines = [
            f"{self.file} ({self.to}, {self.precision or 'precision not known'})",
            f"  bytes       {self.bytes:,}, deflated {self.deflated_bytes:,}",
            f"  load        {1e3 * self.load_seconds:.1f} ms, the runtime {1e3 * self.import_seconds:.0f} ms",
        ]
        for b in self.batches:
            text = b.get("error", "").split("\n")[0][:90]
            if not text:
                text = f"{b['p50_ms']:.3f} ms, p90 {b['p90_ms']:.3f}, p99 {b['p99_ms']:.3f}, {1e3 * b['joules']:.3g} mJ a sample"
                text += "" if b["memory_bytes"] is None else f", {b['memory_bytes'] / 1e6:.1f} MB"
            lines.append(f"  batch {b['batch']:<5} {text}")
        lines.append(f"  energy      {self.energy}")
        if self.accuracy is not None:
            ratio = "" if self.accuracy_ratio is None else f", {self.accuracy_ratio:.4f} of the source's"
            lines.append(f"  accuracy    {self.accuracy:.4f}{ratio} ({self.samples} samples)")
        if self.equal_predictions is not None:
            lines.append(f"  predictions {self.equal_predictions:.2%} equal the source's")
        lines += [f"  fell back   {note}" for note in self.fell_back]
        if self.fastest_precision:
            lines.append(f"  fastest     {self.fastest_precision}")
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines.append(
            f"  on          {self.machine.get('cpu')}, {self.threads} thread(s), {' '.join(self.flags)}; {versions}"
        )
        return "\n".join(lines)


def card_of(
    file: str | Path | Exported,
    inputs: Any,
    targets: Any = None,
    *,
    source: nn.Module | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    threads: int = 1,
    seconds: float = 2.0,
    timeout: float = 300.0,
) -> Card:
    """Measure a file in a process of its own, which loads no torch where the runtime does without.

    Args:
        file: a path, or what `export` returned, whose precision, notes and agreement go onto the card.
        inputs: a numpy array of samples, a tuple of arrays, or a mapping from the names of the inputs.
        targets: the class of each sample, where the accuracy is to be measured.
        source: the model that the file was made of.
        batch_sizes: at which the time of a call is taken.
        threads: of the runtime.
        seconds: for each size, beside a fifth of it to warm up.
        timeout: seconds after which the process is ended.

    Raises:
        ExportError: the runtime is not installed; the file cannot be loaded; the process fails or takes too long.
        ValueError: there are no samples, or not as many targets.
    """
    exported = file if isinstance(file, Exported) else None
    path = file.path if isinstance(file, Exported) else Path(file)
    target = of_file(path)
    if not path.exists():
        raise ExportError(f"there is no file {path}")
    named = isinstance(inputs, Mapping)
    arrays = {str(k): np.asarray(x) for k, x in (inputs.items() if named else enumerate(_tuple(inputs)))}
    samples = {len(x) for x in arrays.values() if x.ndim}
    if len(samples) != 1 or 0 in samples or min((*batch_sizes, threads)) < 1 or not batch_sizes:
        raise ValueError(f"inputs= has {sorted(samples) or 'no'} samples; sizes of batches and threads are 1 at least")
    if targets is not None and len(targets) not in samples:
        raise ValueError(f"there are {len(targets)} targets for {samples.pop()} samples")
    needed(target.module, target.needs)
    card = Card(str(path), target.name, threads=threads, machine=machine(), samples=samples.pop())
    if exported:
        card.precision, card.fell_back, card.agreement = (
            exported.precision,
            exported.fell_back,
            exported.agreement.as_dict(),
        )
    card.bytes, card.deflated_bytes = _sizes(path)
    outputs_batch = OUTPUTS_BATCH if targets is not None or source is not None else 0
    job = {"path": str(path.resolve()), "to": target.name, "named": named, "threads": threads, "samples": card.samples}
    job |= {"batch_sizes": sorted(batch_sizes), "seconds": seconds, "outputs": outputs_batch}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.json").write_text(json.dumps(job))
        np.savez(Path(folder) / "batch.npz", **resized(arrays, max(batch_sizes)))
        if outputs_batch:
            save: Any = np.savez  # whose names of arrays are typed as its own arguments
            save(Path(folder) / "inputs.npz", **arrays)
        _fill(card, _run(Path(folder), threads, timeout))
        outputs = np.load(Path(folder) / "outputs.npy") if outputs_batch else None
    if outputs is not None:
        _judge(card, outputs, targets, source, arrays, named)
    card.versions |= {name: _version(name) for name in ("noctule", target.module.partition(".")[0])}
    return card


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _run(folder: Path, threads: int, timeout: float) -> list[dict[str, Any]]:
    """The events of the process that measures, with the joules that counters gained between "start" and "end"."""
    root = Path(noctule.__file__).parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "noctule.deploy.measured", str(folder)]
    events, late, meter, before = list[dict[str, Any]](), threading.Event(), Meter(), 0
    with (
        (folder / "errors").open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        clock = threading.Timer(timeout, lambda: (late.set(), process.kill()))
        clock.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"event"'):  # a runtime may print too
                    event = json.loads(line)
                    if event["event"] in ("start", "end"):
                        meter.update()
                        gained, before = meter.microjoules - before, meter.microjoules
                        event["joules"] = gained / 1e6 if meter.available else None
                    events.append(event)
            process.wait()
        finally:
            clock.cancel()
            process.kill()
    last = events[-1] if events else {"event": None}
    if late.is_set():
        raise ExportError(
            f"measuring took more than {timeout:g} seconds and was ended: give a larger timeout=, or fewer inputs"
        )
    if last["event"] == "error":
        raise ExportError(f"the file cannot be run: {last['error']}")
    if last["event"] != "done":
        said = (folder / "errors").read_text()[-1000:].strip() or "it said nothing"
        raise ExportError(f"the process that measures died with status {process.returncode}: {said}")
    return events


def _fill(card: Card, events: list[dict[str, Any]]) -> None:
    joules, empty, counted = None, None, False
    for event in events:
        kind = event.pop("event")
        if kind == "loaded":
            empty = event.pop("empty_bytes")
            vars(card).update(event)
        elif kind == "end":
            joules, counted = event["joules"], event["joules"] is not None
        elif kind == "batch":
            if "error" not in event:
                of_a_call = event["cpu_seconds"] * WATTS if joules is None else joules / event["calls"]
                event["joules"] = of_a_call / event["batch"]
                peak = event.pop("peak_bytes")
                event["memory_bytes"] = None if peak is None or empty is None else peak - empty
            card.batches.append(event)
        elif kind == "done":
            vars(card).update(event)
    card.energy = (
        "from the counters of the processors and their memory (RAPL), all else that they did included"
        if counted
        else f"an estimate: processor seconds times {WATTS:g} W; no counter can be read"
    )
    if all("error" in entry for entry in card.batches):
        raise ExportError(f"the file cannot be run with these inputs: {card.batches[0]['error']}")


def _judge(
    card: Card, outputs: np.ndarray, targets: Any, source: nn.Module | None, arrays: dict[str, np.ndarray], named: bool
) -> None:
    """Accuracy, and predictions beside the source's."""
    if outputs.ndim < 2 or outputs.shape[-1] < 2:
        return  # no classes
    predictions = outputs.argmax(-1)
    right = None if targets is None else np.asarray(targets)
    if right is not None:
        card.accuracy = float((predictions == right).mean())
    if source is None:
        return
    parts = []
    for at in range(0, len(outputs), OUTPUTS_BATCH):
        tensors = {name: torch.from_numpy(x[at : at + OUTPUTS_BATCH]) for name, x in arrays.items()}
        parts.append(answers(source, () if named else tuple(tensors.values()), tensors if named else {}).numpy())
    own = np.concatenate(parts).argmax(-1)
    card.equal_predictions = float((predictions == own).mean())
    if right is not None and card.accuracy is not None and (accuracy := float((own == right).mean())):
        card.accuracy_ratio = card.accuracy / accuracy


def _sizes(path: Path) -> tuple[int, int]:
    """Bytes of a file and of the weights beside it, as they are and deflated."""
    files = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    whole, deflated = 0, 0
    for file in files:
        packer = zlib.compressobj(6)
        with file.open("rb") as opened:
            while part := opened.read(2**20):
                whole, deflated = whole + len(part), deflated + len(packer.compress(part))
        deflated += len(packer.flush())
    return whole, deflated


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return noctule.__version__
