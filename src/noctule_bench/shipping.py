"""What half of the width and int8 make of a large residual network in a runtime without torch."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noctule.compress.shrink import shrink
from noctule.core.errors import ExportError
from noctule.deploy import card_of, export
from noctule.deploy.targets import named
from noctule.measure import interleave, ratio
from noctule.models import resnet
from noctule_bench import program

FULL, LEAST = "full float32", "half int8"
TARGETS = {"faster": 5.0, "smaller": 12.0, "less_memory": 2.0}
"""Of half the width in int8 over the full float32 model, in ONNX Runtime."""


def shipping(
    *,
    to: str = "onnxruntime",
    depth: int = 18,
    image: int = 224,
    classes: int = 1000,
    batch: int = 1,
    calibration: int = 16,
    activation_bits: int = 8,
    rounds: int = 30,
    threads: int = 1,
    seconds: float = 2.0,
    out: Path | None = None,
) -> None:
    """Latency, bytes and memory of a residual network, full and at half width, in each precision of a runtime.

    The weights are random: this is about costs, not accuracy.

    Args:
        to: a runtime that `noctule.deploy.export` writes for.
        depth: of the residual network.
        image: pixels a side, in three colours.
        classes: numbers out.
        batch: samples of a call.
        calibration: images that ranges of activations are measured with.
        activation_bits: 8, or 7, whose sums of products cannot saturate.
        rounds: calls of each file, interleaved.
        threads: of the runtime.
        seconds: for each file in a process of its own, where its memory is measured.
        out: a file that the lines are appended to.
    """
    program.at_least_one(rounds=rounds, threads=threads, batch=batch, calibration=calibration)
    lines, target = program.Lines(out), named(to)
    torch.set_num_threads(threads)
    about = {"to": to, "depth": depth, "image": image, "batch": batch, "activation_bits": activation_bits}
    written: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files, cards = {}, {}
        batches = list(torch.rand(calibration, 3 * image**2, generator=torch.Generator().manual_seed(0)).split(4))
        inputs = batches[0][:1].expand(batch, -1).contiguous()
        for width, model in _models(depth, image, classes).items():
            for precision in target.precisions:
                row = f"{width} {precision}"
                path = Path(folder) / f"{width}-{precision}{target.suffix}"
                try:
                    how: dict[str, Any] = {"precision": precision, "batches": batches if precision == "int8" else None}
                    exported = export(model, inputs, path, to=to, activation_bits=activation_bits, **how)
                    cards[row] = card_of(
                        exported, inputs.numpy(), batch_sizes=(batch,), threads=threads, seconds=seconds
                    )
                    files[row] = target.open(path, threads)
                except ExportError as error:
                    written.append(lines.write("shipping", row=row, **about, error=str(error)))
        calls = {row: (lambda run=run: run(inputs.numpy())) for row, run in files.items()}
        timings = interleave(calls, rounds=rounds)
    full = cards[FULL]
    fastest = min(timings, key=lambda row: timings[row].median_seconds)
    for row, card in cards.items():
        memory, speedup = card.at(batch)["memory_bytes"], ratio(timings[FULL], timings[row])
        figures = {"faster": speedup.value, "smaller": full.bytes / card.bytes}
        figures["less_memory"] = full.at(batch)["memory_bytes"] / memory if memory else None
        written.append(
            lines.write(
                "shipping",
                row=row,
                **about,
                timing=timings[row],
                speedup=speedup,
                **figures,
                memory_bytes=memory,
                card=card,
                fastest=fastest,
            )
        )
    columns: Mapping[str, program.Column] = {
        "file": "{row}",
        "ms": program.milliseconds(2),
        "times faster": program.TIMES,
        "MB": lambda line: f"{line['card']['bytes'] / 1e6:.2f}",
        "times smaller": "{smaller:.1f}",
        "memory, MB": lambda line: f"{line['memory_bytes'] / 1e6:.0f}" if line["memory_bytes"] else "-",
    }
    program.table(
        written, "shipping", f"shipping: residual network of {depth} layers in {to}; fastest: {fastest}", columns
    )
    program.show_errors([line for line in written if "error" in line])
    if (to, depth, image) == ("onnxruntime", 18, 224):
        best = next(line for line in written if line.get("row") == LEAST)
        ends = [
            lines.write(
                "shipping.target", row=what, **about, found=best[what], target=least, holds=(best[what] or 0.0) >= least
            )
            for what, least in TARGETS.items()
        ]
        program.targets(ends, "shipping", {"what": "{row}", "found": "{found:.2f}"})


def _models(depth: int, image: int, classes: int) -> dict[str, nn.Module]:
    """The network, and the same with half of its channels."""
    made = {}
    for width in ("full", "half"):
        torch.manual_seed(0)
        made[width] = model = resnet((3, image, image), classes, depth=depth).eval()
        if width == "half":
            shrink(model, 0.5, example=torch.rand(1, 3 * image**2), round_to=8)
    return made
