"""A character transformer: milliseconds of a training step, where they go, and what sparsity costs in nats at equal steps."""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from noctule.core.errors import UsageError
from noctule.data import read_text
from noctule.measure import ratio
from noctule.measure.turns import Turns, Workers
from noctule.recipes import sparse_transformer
from noctule.report import RunFolder
from noctule_bench import program
from noctule_bench.transformer_steps import HEAD, ROWS, Case, Row, build, take_apart

PARTS = ("speed", "profile", "quality")
TARGET_FROM, TARGET = 1024, 1.5
"""From this width on: how many times as fast as dense float32."""
WITHIN_NATS = 0.05
"""Of the dense twin after as many steps, on the validation part."""


def transformer(
    *,
    threads: tuple[int, ...] = (1, 2),
    text: Path | None = None,
    widths: tuple[int, ...] = (512, 1024, 2048),
    depth: int = 2,
    batch: int = 8,
    context: int = 128,
    density: float = 0.1,
    rounds: int = 9,
    block_ms: float = 500.0,
    quality_width: int = 1024,
    epochs: int = 1,
    seeds: tuple[int, ...] = (0,),
    parts: tuple[str, ...] = (),
    runs: Path | None = None,
    out: Path | None = None,
) -> None:
    """Time a training step of a character transformer beside its dense twin, take it apart, and train both alike.

    Args:
        threads: each of these in turn; the trainings take the last.
        text: a file in UTF-8 (default: what Python's own help says of the language).
        widths: of the residual stream, each in turn; a head has 64 features.
        depth: blocks.
        batch: windows of the text in a step.
        context: characters of a window.
        density: share of the linear layers' weights that the sparse one stores.
        rounds: turns of each row.
        block_ms: milliseconds of steps in each turn.
        quality_width: of the two that are trained.
        epochs: of these, each some 360 steps at the default sizes.
        seeds: one pair of trainings for each.
        parts: speed, profile, quality (default: all).
        runs: a folder where the trainings are kept; finished ones found there are not trained again.
        out: a file that the lines are appended to.
    """
    program.at_least_one(
        threads=min(threads or (0,)), depth=depth, batch=batch, context=context, rounds=rounds, epochs=epochs,
        seeds=len(seeds), widths=min(widths or (0,)), quality_width=quality_width,
    )  # fmt: skip
    if not 0.0 < density <= 1.0:
        raise UsageError(f"density must lie in (0, 1], got {density}")
    chosen = program.chosen(parts, list(PARTS))
    name = None if text is None else str(text)
    read_text(name, context=context)  # refuses what cannot be before anything is measured
    lines = program.Lines(out)
    written: list[dict[str, Any]] = []
    for number in threads if {"speed", "profile"} & set(chosen) else ():
        torch.set_num_threads(number)  # so that the lines say so
        with Workers(number) as workers:
            for width in widths:
                case = Case(width, depth, batch, context, density, name)
                if "speed" in chosen:
                    written += _time(workers, lines, case, rounds, block_ms / 1e3)
                if "profile" in chosen:
                    written += _profile(workers, lines, case)
    if "quality" in chosen:
        torch.set_num_threads(threads[-1])
        case = Case(quality_width, depth, batch, context, density, name)
        written += _quality(lines, case, epochs, seeds, runs)
    _show(written)


def _time(
    workers: Workers, lines: program.Lines, case: Case, rounds: int, block_seconds: float
) -> list[dict[str, Any]]:
    for row in ROWS.values():
        workers.prepare(row.name, row.process, build, row, case)
    label = f"width {case.width}, {workers.threads} threads"
    taken = workers.take_turns(rounds=rounds, block_seconds=block_seconds, label=label)
    workers.forget()
    about = {"threads": workers.threads, **vars(case)}
    dense = taken["dense fp32"]
    written = [
        lines.write(
            "transformer",
            row=name,
            **about,
            timing=turns.timing,
            busy_cores=round(turns.busy_cores, 3),
            characters_per_second=round(case.batch * case.context / turns.timing.median_seconds),
            speedup=ratio(dense.timing, turns.timing),
        )
        for name, turns in taken.items()
    ]
    if case.width >= TARGET_FROM:
        written.append(_target(lines, about, taken))
    return written


def _target(lines: program.Lines, about: Mapping[str, Any], taken: Mapping[str, Turns]) -> dict[str, Any]:
    speedup = ratio(taken["dense fp32"].timing, taken["noctule"].timing)
    return lines.write(
        "transformer.target",
        **about,
        what=f"times as fast as dense fp32, width {about['width']}",
        found=speedup.value,
        speedup=speedup,
        target=TARGET,
        holds=speedup.value >= TARGET,
    )


def _profile(workers: Workers, lines: program.Lines, case: Case) -> list[dict[str, Any]]:
    def apart(row: Row) -> dict[str, Any]:
        taken = workers.run(row.process, take_apart, row, case, 3)
        whole = sum(taken.values())
        shares = {kind: round(milliseconds / whole, 4) for kind, milliseconds in taken.items()}
        about = {"threads": workers.threads, **vars(case)}
        return lines.write("transformer.profile", row=row.name, **about, milliseconds=whole, shares=shares)

    return [apart(row) for row in ROWS.values()]


def _quality(
    lines: program.Lines, case: Case, epochs: int, seeds: Sequence[int], runs: Path | None
) -> list[dict[str, Any]]:
    """Both twins after the same steps on the same batches; the last validation counts, not the best."""
    threads = torch.get_num_threads()
    about = {"threads": threads, **vars(case), "epochs": epochs}
    written, differences = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in seeds:
            options = {**vars(case), "heads": max(1, case.width // HEAD), "epochs": epochs, "seed": seed}
            records = _trained((runs or Path(temporary)) / f"transformer-{case.width}-{seed}", options)
            sparse, dense = records["sparse"], records["dense"]
            differences.append(sparse["validation_loss"] - dense["validation_loss"])
            written.append(
                lines.write(
                    "transformer.quality",
                    **about,
                    seed=seed,
                    steps=sparse["step"],
                    sparse_nats=sparse["validation_loss"],
                    dense_nats=dense["validation_loss"],
                    difference_nats=differences[-1],
                    sparse_seconds=sparse["seconds"],
                    dense_seconds=dense["seconds"],
                )
            )
    mean = fmean(differences)
    what = f"nats above dense after as many steps, width {case.width}"
    holds = mean <= WITHIN_NATS
    return [
        *written,
        lines.write("transformer.target", **about, what=what, found=mean, target=WITHIN_NATS, holds=holds),
    ]


def _trained(path: Path, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last record of either series of a run of the recipe, which goes on where it stopped."""
    if (path / "run.json").exists():
        run = RunFolder(path)
        if run.about()["options"] != options:
            raise UsageError(f"{path} is a run with other options: choose another --runs folder")
    else:
        run = RunFolder.create(
            path, recipe="sparse_transformer", options=options, seed=options["seed"], threads=torch.get_num_threads()
        )
    with run, redirect_stdout(sys.stderr):  # stdout is for the lines
        text = None if options["text"] is None else Path(options["text"])
        sparse_transformer(run, **{**options, "text": text}, compare="dense")
        return {record["series"]: record for record in run.metrics()}


def _show(written: Sequence[dict[str, Any]]) -> None:
    def share(kind: str) -> program.Column:
        return lambda line: f"{line['shares'][kind]:.1%}"

    where = {"row": "{row}", "threads": "{threads}", "width": "{width}"}
    program.table(
        written,
        "transformer",
        "transformer: milliseconds of a training step",
        {
            **where,
            "ms": program.milliseconds(1),
            "characters/s": "{characters_per_second:,}",
            "x dense fp32": program.speedup,
        },
    )
    kinds = dict.fromkeys(kind for line in written for kind in line.get("shares", ()))
    program.table(
        written,
        "transformer.profile",
        "transformer: where the time of a step goes",
        {**where, **{kind: share(kind) for kind in kinds}},
    )
    program.table(
        written,
        "transformer.quality",
        "transformer: nats per character on the validation part",
        {
            "seed": "{seed}",
            "width": "{width}",
            "steps": "{steps}",
            "sparse": "{sparse_nats:.4f}",
            "dense": "{dense_nats:.4f}",
            "difference": "{difference_nats:+.4f}",
            "sparse s": "{sparse_seconds:.0f}",
            "dense s": "{dense_seconds:.0f}",
        },
    )
    program.targets(written, "transformer", {"what": "{what}", "threads": "{threads}", "found": "{found:.3f}"})
