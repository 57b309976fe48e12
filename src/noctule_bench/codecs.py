"""Codecs on one tensor: how fast they encode and decode, how few bytes they need, and how far off they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noctule.codecs import (
    QSGD,
    Affine,
    Cast,
    Codec,
    LowRank,
    NaturalCompression,
    NaturalDithering,
    RandomK,
    SignSGD,
    TernGrad,
    TopK,
    reference,
)
from noctule.measure import Timing, interleave
from noctule_bench import program

CODECS: dict[str, Codec] = {
    "bfloat16": Cast(torch.bfloat16),
    "natural": NaturalCompression(),
    "natural, deflated": NaturalCompression(entropy=True),
    "affine 8": Affine(8),
    "affine 4, stochastic": Affine(4, stochastic=True),
    "natural dithering 7": NaturalDithering(7),
    "qsgd 7": QSGD(7),
    "terngrad": TernGrad(),
    "sign": SignSGD(),
    "top 1 %": TopK(0.01),
    "top 1.56 %, natural": TopK(1 / 64, values=NaturalCompression()),
    "random 1 %": RandomK(0.01),
    "low rank 4": LowRank(4),
}
TARGETS = {("natural", "encode"): 2.0, ("natural", "decode"): 2.0}
"""Gigabytes of float32 a second, with one thread."""


@dataclass(frozen=True)
class Row:
    """What is timed; `bits` for each element and `error`, the squared one as a share of the squared norm, say what it does."""

    encode: Callable[[], object]
    decode: Callable[[], object]
    bits: float
    error: float


def codecs(
    *,
    threads: tuple[int, ...] = (1, 2),
    rows: tuple[str, ...] = (),
    elements: int = 2_500_000,
    rounds: int = 15,
    out: Path | None = None,
) -> None:
    """Time each codec on normal numbers, beside torch's own operations and a plain copy.

    A link is worth a codec where it is slower than the megabits that the line says: there encoding, decoding and what is left to
    send take as long together as sending float32.

    Args:
        threads: each of these in turn.
        rows: of these (default: all).
        elements: of the tensor, a matrix of 1000 columns.
        rounds: turns of each row.
        out: a file that the lines are appended to.
    """
    program.at_least_one(rounds=rounds, elements=elements // 1000, threads=min(threads or (0,)))
    x = torch.randn(elements // 1000, 1000, generator=torch.Generator().manual_seed(0))
    builders = {**{name: _codec_row(codec, x) for name, codec in CODECS.items()}, **_plain_rows(x)}
    names = program.chosen(rows, list(builders))
    lines, written = program.Lines(out), []
    for number in threads:
        torch.set_num_threads(number)
        measured = {name: builders[name]() for name in names}
        timings = interleave(
            {(name, way): getattr(row, way) for name, row in measured.items() for way in ("encode", "decode")},  # type: ignore[misc]
            rounds=rounds,
        )
        for name, row in measured.items():
            written.append(_line(lines, name, row, number, x.nbytes, timings[name, "encode"], timings[name, "decode"]))  # type: ignore[index]
        written += _judge(lines, number, written)
    _show(written)


def _codec_row(codec: Codec, x: Tensor) -> Callable[[], Row]:
    def build() -> Row:
        generator = torch.Generator().manual_seed(0)
        payload = codec.encode(x, generator)
        bits = 8 * payload.nbytes / x.numel()
        return Row(
            lambda: codec.encode(x, generator), lambda: codec.decode(payload), bits, _error(x, codec.decode(payload))
        )

    return build


def _plain_rows(x: Tensor) -> dict[str, Callable[[], Row]]:
    """What there is without codecs of our own."""
    x_N, k = x.flatten(), x.numel() // 100

    def natural() -> Row:
        codes, floors = reference.natural_encode(x_N, 1024, 1)
        bits = 8 * (codes.nbytes + floors.nbytes) / x.numel()
        y = reference.natural_decode(codes, floors, 1024)
        return Row(
            lambda: reference.natural_encode(x_N, 1024, 1),
            lambda: reference.natural_decode(codes, floors, 1024),
            bits,
            _error(x_N, y),
        )

    def top() -> Row:
        def encode() -> tuple[Tensor, Tensor]:
            positions = x_N.abs().topk(k, sorted=False).indices
            return positions.to(torch.int32), x_N[positions]

        def decode() -> Tensor:
            return torch.zeros_like(x_N).index_copy_(0, positions.to(torch.int64), values)

        positions, values = encode()
        return Row(encode, decode, 64 * k / x.numel(), _error(x_N, decode()))

    def copy() -> Row:
        return Row(x.clone, x.clone, 32.0, 0.0)

    return {"natural, plain torch": natural, "top 1 %, torch.topk": top, "copy": copy}


def _error(x: Tensor, y: Tensor) -> float:
    return float((y.double() - x.double()).norm() ** 2 / x.double().norm() ** 2)


def _line(
    lines: program.Lines, name: str, row: Row, threads: int, nbytes: int, encode: Timing, decode: Timing
) -> dict[str, Any]:
    seconds = encode.median_seconds + decode.median_seconds
    return lines.write(
        "codecs",
        row=name,
        threads=threads,
        bytes=nbytes,
        bits_per_element=round(row.bits, 4),
        squared_error=row.error,
        encode=encode,
        decode=decode,
        encode_gigabytes_per_second=round(nbytes / encode.median_seconds / 1e9, 3),
        decode_gigabytes_per_second=round(nbytes / decode.median_seconds / 1e9, 3),
        worth_it_below_megabits=round((1 - row.bits / 32) * nbytes * 8 / seconds / 1e6, 1),
    )


def _judge(lines: program.Lines, threads: int, written: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {line["row"]: line for line in written if line["name"] == "codecs" and line["threads"] == threads}
    return [
        lines.write(
            "codecs.target",
            row=row,
            what=way,
            threads=threads,
            gigabytes_per_second=(speed := found[row][f"{way}_gigabytes_per_second"]),
            target=least,
            holds=speed >= least,
        )
        for (row, way), least in TARGETS.items()
        if row in found and threads == 1
    ]


def _show(written: Sequence[dict[str, Any]]) -> None:
    program.table(
        written,
        "codecs",
        "codecs: gigabytes of float32 a second",
        {
            "row": "{row}",
            "threads": "{threads}",
            "encode": "{encode_gigabytes_per_second:.2f}",
            "decode": "{decode_gigabytes_per_second:.2f}",
            "bits": "{bits_per_element:.3f}",
            "squared error": "{squared_error:.4g}",
            "worth it below Mbit/s": "{worth_it_below_megabits:.0f}",
        },
    )
    columns = {"row": "{row}", "what": "{what}", "GB/s": "{gigabytes_per_second:.2f}"}
    program.targets(written, "codecs", columns)
