"""Write a model as the file of another runtime, and keep the file only if it computes what the model does."""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from noctule.core.errors import ExportError, UsageError
from noctule.deploy.agreement import Agreement, agreement, first_difference
from noctule.deploy.prepare import arguments, in_precision
from noctule.deploy.target import Job, Ranges, needed
from noctule.deploy.targets import named


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    to: str
    precision: str
    fell_back: list[str]
    """What runs in another way than asked for, and why."""
    agreement: Agreement


def export(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    to: str = "onnxruntime",
    precision: str = "float32",
    ranges: Ranges | None = None,
    batches: Iterable[Any] | None = None,
    activation_bits: int = 8,
) -> Exported:
    """Write a model for a runtime; what the file computes is compared with the model before it takes the file's name.

    Batch norms are folded into the layers before them. Sparse layers are written dense, but for
    "noctule". The model stays as it is.

    Args:
        model: dense, sparse or quantised; it is written in evaluation mode.
        example: a batch of its inputs: a tensor, a tuple of arguments, or a mapping from their names.
        path: what the file is called; its suffix is that of the target.
        to: a name of `TARGETS`.
        precision: "float32", "bfloat16" or "int8", as far as the target has it.
        ranges: of the inputs of layers, from `calibrate` after `fold_batch_norms`, to quantise a model in floating point.
        batches: of training data, as for `calibrate`, or mappings of arguments: they give ``ranges`` where there are none, and
            ranges of what layers give. Without them the latter are those of the example.
        activation_bits: 8, or 7 for runtimes whose sums saturate on processors without VNNI, as OpenVINO's do.

    Raises:
        UsageError: the target, its precision or the suffix is none that there is.
        ExportError: the runtime is not installed; it lacks an operator; the answers differ; the file cannot be written.
            What was at the path before stays.
    """
    target, path = named(to), Path(path)
    if precision not in target.precisions:
        raise UsageError(f"{to} has no precision {precision!r}, it has {', '.join(target.precisions)}")
    if path.suffix != target.suffix:
        raise UsageError(f"a file for {to} ends in {target.suffix}, got {path.name}")
    if target.module != "noctule.runtime":
        needed(target.module, target.needs)
    args, kwargs = arguments(example)
    prepared, inputs, outputs = in_precision(model, example, precision, ranges, batches, activation_bits)
    with _in_place(path) as temporary:
        job = Job(
            model=prepared,
            args=args,
            kwargs=kwargs,
            path=temporary,
            precision=precision,
            ranges=inputs,
            outputs=outputs,
        )
        written = target.write(job)
        batch = next(len(x) for x in (*args, *kwargs.values()) if hasattr(x, "shape"))
        low, high = written.batches
        others = (size for size in (3, 5, 2, 1) if size != batch and low <= size <= (high or size))
        sizes = (batch, *islice(others, 1))
        found = agreement(model, args, kwargs, target.open(temporary, 1), precision, sizes)
        if not found.holds:
            where = first_difference(model, args, kwargs, written, precision)
            layer = f"The first layer that differs is {where}" if where else "No single layer was found to differ"
            known = "".join(f". {note}" for note in written.fell_back)
            raise ExportError(
                f"the file does not compute what the model does, so it was removed. {found}. {layer}{known}"
            )
    return Exported(path, to, precision, written.fell_back, found)


@contextmanager
def _in_place(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder of its own; afterwards all that is in there takes its place beside the path.

    Raises:
        ExportError: there is no room, or the folder cannot be written to; what was there stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder) / path.name
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)  # weights before the graph
            for file in files:
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            for file in files:
                os.replace(file, path.parent / file.name)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "; free some space or choose another disk" if full else ""
        raise ExportError(
            f"could not write {path}: {error.strerror or error}{remedy}; what was there before is as it was"
        ) from error
