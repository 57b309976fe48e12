"""Inference of shipped models beside ONNX Runtime: seconds a call by batch, bytes on disk, memory of the process, one thread.

Three layers of 1024 x 1024 with ReLU, random weights: what is measured does not depend on their values.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from noctule import runtime
from noctule.compress.quantize import StaticInt8, calibrate
from noctule.core.convert import convert_
from noctule.deploy import card_of, export
from noctule.measure.timing import Timing, interleave
from noctule.models import mlp
from noctule.sparse.layers import ToSparse
from noctule_bench import program

WIDTH, SATURATING = 1024, "onnxruntime int8, saturating"
FLOATS = {0.1: 2.5, 0.05: 5.0}
"""Density -> the least times faster than ONNX Runtime in float32, batch 64."""
CODES, BLOCKS, SINGLE, SINGLE_FLOATS = (
    {0.1: 1.5, 0.05: 2.5},
    {0.1: 2.5, 0.05: 4.0},
    {0.1: 2.0, 0.05: 3.0},
    {0.1: 1.0, 0.05: 1.3},
)
"""The same of integers at any places and in blocks of four, against its static int8 in its faster mode; the last two: batch 1."""
SMALLER = {0.1: 17.0, 0.05: 35.0}
"""Density -> the least times fewer bytes of a layer in int8 than dense float32."""
MEMORY, IMPORT = 45e6, 0.5
"""Bytes of the process with a sparse model of three million weights, all of it, and seconds to import the runtime."""


def inference(
    *,
    batches: tuple[int, ...] = (1, 2, 8, 16, 33, 64),
    densities: tuple[float, ...] = (0.1, 0.05, 0.01),
    rounds: int = 31,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Time sparse and integer layers in our runtime beside ONNX Runtime in float32 and static int8.

    Args:
        batches: samples of a call.
        densities: shares of the weights that are stored.
        rounds: in which all take turns.
        seed: of the weights.
        out: a file that the lines are appended to.
    """
    program.at_least_one(batches=min(batches), rounds=rounds)
    torch.set_num_threads(1)
    lines, written = program.Lines(out), list[dict[str, Any]]()
    with TemporaryDirectory() as name:
        files = _files(Path(name), densities, seed)
        calls = {row: _saturating(path) if row == SATURATING else _opened(path) for row, path in files.items()}
        for batch in batches:
            x = np.random.default_rng(seed).random((batch, WIDTH)).astype(np.float32)
            times = interleave({row: lambda call=call, x=x: call(x) for row, call in calls.items()}, rounds=rounds)
            written += [_line(lines, row, batch, times) for row in calls]
        written += [_size(lines, row, path) for row, path in files.items() if "int8" in row and "onnx" not in row]
        written += _memory(lines, Path(name), seed)
    columns: dict[str, program.Column] = {
        "layers": "{row}",
        "batch": "{batch}",
        "us": lambda line: f"{1e6 * line['seconds']:.0f}",
        "beside ORT float32": "{floats:.2f}",
        "beside ORT int8": "{codes:.2f}",
        "us a sample": lambda line: f"{1e6 * line['seconds'] / line['batch']:.1f}",
    }
    program.table(written, "inference", "inference: medians, three layers 1024 x 1024, one thread", columns)
    for line in _targets(written):
        written.append(lines.write("inference.target", **line))
    program.targets(written, "inference", {"what": "{row}", "found": "{found:.3g}"})


def _network(density: float | None, seed: int, *, blocks: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    if blocks and density:
        for layer in layers:
            layer.weight.data *= (torch.rand(WIDTH, WIDTH // 4) < density).repeat_interleave(4, 1)
    elif density:
        convert_(model, ToSparse(density=density))
    return model.eval()


def _files(folder: Path, densities: tuple[float, ...], seed: int) -> dict[str, Path]:
    """The files of all rows, by the row's name."""
    sample, files = torch.rand(256, WIDTH, generator=torch.Generator().manual_seed(seed)), dict[str, Path]()

    def write(row: str, model: nn.Module, to: str, precision: str) -> None:
        path = folder / f"{row.replace(' ', '-')}.{'onnx' if to == 'onnxruntime' else 'noctule'}"
        if precision == "int8":
            model = convert_(model, StaticInt8(ranges=calibrate(model, [sample]))).model
        files[row] = export(model, sample[:4], path, to=to, precision=precision).path

    write("onnxruntime float32", _network(None, seed), "onnxruntime", "float32")
    write("onnxruntime int8", _network(None, seed), "onnxruntime", "int8")
    files[SATURATING] = files["onnxruntime int8"]
    write("dense float32", _network(None, seed), "noctule", "float32")
    write("dense int8", _network(None, seed), "noctule", "int8")
    for density in densities:
        write(f"{density:g} float32", _network(density, seed), "noctule", "float32")
        write(f"{density:g} int8", _network(density, seed), "noctule", "int8")
        write(f"{density:g} int8 blocks", _network(density, seed, blocks=True), "noctule", "int8")
    return files


def _opened(path: Path) -> Callable[[np.ndarray], Any]:
    if path.suffix == ".noctule":
        return runtime.load(path)
    from noctule.deploy.targets import of_file

    return of_file(path).open(path, 1)


def _saturating(path: Path) -> Callable[[np.ndarray], Any]:
    """ONNX Runtime as it comes: without VNNI its sums of 16 bits saturate, and it is faster."""
    library: Any = import_module("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads = 1
    session = library.InferenceSession(str(path), options)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _line(lines: program.Lines, row: str, batch: int, times: dict[str, Timing]) -> dict[str, Any]:
    median = {name: timing.median_seconds for name, timing in times.items()}
    own, codes = median[row], min(median["onnxruntime int8"], median[SATURATING])
    peers = {"floats": median["onnxruntime float32"] / own, "codes": codes / own}
    about = {"seconds": own, "instruction_set": runtime.instruction_set()}
    return lines.write("inference", row=row, batch=batch, **about, **peers)


def _size(lines: program.Lines, row: str, path: Path) -> dict[str, Any]:
    fewer = 3 * 4 * WIDTH * (WIDTH + 1) / path.stat().st_size
    return lines.write("inference.size", row=row, bytes=path.stat().st_size, fewer=fewer)


def _memory(lines: program.Lines, folder: Path, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    model = convert_(mlp(784, 1024, 1024, 1024, 10), ToSparse(density=0.1)).model.eval()
    x = torch.rand(256, 784)
    model = convert_(model, StaticInt8(ranges=calibrate(model, [x]), narrowest=1)).model
    card = card_of(export(model, x[:4], folder / "mlp.noctule", to="noctule", precision="int8"), x.numpy(), seconds=0.5)
    figures = {"memory_bytes": card.at(64)["memory_bytes"], "import_seconds": card.import_seconds, "bytes": card.bytes}
    return [
        lines.write(
            "inference.memory", row="MLP of 3 million weights, 10 %, int8", torch_loaded=card.torch_loaded, **figures
        )
    ]


def _targets(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def found(row: str, batch: int, peer: str) -> float | None:
        return next(
            (x[peer] for x in written if x["name"] == "inference" and (x["row"], x["batch"]) == (row, batch)), None
        )

    wanted: list[tuple[str, float | None, float]] = []
    for kind, batch, peer, targets in (
        ("float32", 64, "floats", FLOATS),
        ("int8", 64, "codes", CODES),
        ("int8 blocks", 64, "codes", BLOCKS),
        ("float32", 1, "floats", SINGLE_FLOATS),
        ("int8", 1, "codes", SINGLE),
    ):
        for density, least in targets.items():
            wanted.append((f"{density:g} {kind}, batch {batch}", found(f"{density:g} {kind}", batch, peer), least))
    for density, least in SMALLER.items():
        own = [x for x in written if x["name"] == "inference.size"]
        fewer = next((x["fewer"] for x in own if x["row"] == f"{density:g} int8"), None)
        wanted.append((f"{density:g} int8, times fewer bytes", fewer, least))
    return [
        {"row": row, "found": value, "target": least, "holds": value >= least}
        for row, value, least in wanted
        if value is not None
    ]
