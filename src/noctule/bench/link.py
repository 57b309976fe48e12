"""A training step over links of several kinds: plain data-parallel training, torch's hooks, and Noctule's exchanges."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from noctule.bench import link_steps, program
from noctule.errors import UsageError
from noctule.measure import Progress, ratio
from noctule.measure.timing import Timing
from noctule.testing.link import Link, Network, available, shaped_network
from noctule.testing.processes import Workers

BASE = "ddp fp32"
TARGETS = {
    "100/5": {"natural": 2.5, "top 1 %": 4.0, "PowerSGD 4": 7.0},
    "20/25": {"natural": 2.8, "top 1 %": 15.0, "PowerSGD 4": 11.0},
}
"""Link -> row -> how many times as fast as plain DDP in float32, for two workers and ten megabytes."""
AUTO_WITHIN = 1.1
"""How many times as slow as the best of all ways the automatic choice may be."""


def link(
    *,
    links: tuple[str, ...] = ("none", "1000/0.5", "100/5", "20/25"),
    rows: tuple[str, ...] = (),
    workers: int = 2,
    megabytes: float = 10.0,
    batch: int = 32,
    rounds: int = 5,
    steps: int = 2,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Time a data-parallel training step over shaped links, gradients sent in several ways.

    Args:
        links: MBIT/MS, the bandwidth and the delay one way of each, or none for an unshaped link.
        rows: names of the ways (default: all).
        workers: processes, each in a network namespace of its own.
        megabytes: of the model's weights.
        batch: rows of each worker's batch.
        rounds: turns of everyone.
        steps: in each turn.
        threads: of each worker.
        out: a file that the lines are appended to.
    """
    program.at_least_one(workers=workers - 1, batch=batch, rounds=rounds, steps=steps, threads=threads)
    if not megabytes > 0.0:
        raise UsageError(f"a model has some megabytes, got {megabytes}")
    if why := available():
        raise UsageError(f"links cannot be shaped here: {why}")
    names, shapes = program.chosen(rows, list(link_steps.ROWS)), {text: parsed(text) for text in links}
    lines = program.Lines(out)
    written: list[dict[str, Any]] = []
    torch.set_num_threads(threads)  # so that the lines say so
    for text, shape in shapes.items():
        with (
            shaped_network(workers, link=shape) as network,
            Workers(workers, network=network, threads=threads, group_timeout_seconds=300.0) as group,
        ):
            about = {"link": text, "workers": workers}
            written += _measure(lines, group, network, names, about, megabytes, batch, rounds, steps)
    _show(written)


def main(argv: Sequence[str] | None = None) -> int:
    """``noctule bench link``."""
    return program.run("link", link, argv)


def parsed(text: str) -> Link:
    """The link that its name says.

    >>> parsed("100/5")
    Link(megabits=100.0, delay_ms=5.0, loss=0.0, mtu=None, seed=0)
    """
    if text == "none":
        return Link()
    try:
        megabits, delay = (float(part) for part in text.split("/"))
        return Link(megabits=megabits, delay_ms=delay)
    except ValueError as error:
        raise UsageError(f"a link is MBIT/MS, such as 100/5, or none; got {text!r}") from error


def _measure(
    lines: program.Lines,
    group: Workers,
    network: Network,
    names: Sequence[str],
    about: dict[str, Any],
    megabytes: float,
    batch: int,
    rounds: int,
    steps: int,
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in names}
    said: dict[str, list[float]] = {name: [] for name in names}
    counted: dict[str, list[float]] = {name: [] for name in names}
    weights = 0
    for name in names:
        (weights, *_) = group.call(link_steps.prepare, name, megabytes, batch, timeout_seconds=300.0)
        group.call(link_steps.timed, name, 2, timeout_seconds=300.0)  # DDP cuts its buckets anew after the first step
    with Progress(rounds * len(names), label=f"link {about['link']}", unit="turns") as progress:
        for _ in range(rounds):
            for name in names:
                before = network.bytes_sent(0)
                found = group.call(link_steps.timed, name, steps, timeout_seconds=300.0)
                counted[name].append((network.bytes_sent(0) - before) / steps)
                seconds[name].append(max(each["seconds"] for each in found))
                said[name].append(found[0]["bytes"])
                progress.advance()
    chosen = group.call(link_steps.why)[0] if "auto" in names else None
    group.call(link_steps.forget)
    timings = {name: Timing(tuple(each)) for name, each in seconds.items()}
    written = []
    for name, timing in timings.items():
        speedup = ratio(timings[BASE], timing) if BASE in timings else None
        line = lines.write(
            "link", **about, row=name, model_bytes=weights, timing=timing, speedup=speedup,
            bytes_said=median(said[name]), bytes_counted=median(counted[name]),
        )  # fmt: skip
        written.append(line)
        if name == "auto":
            written.append(_judged(lines, about, timings, chosen))
        target = TARGETS.get(about["link"], {}).get(name)
        if target and speedup and about["workers"] == 2:
            holds = speedup.value >= target
            written.append(
                lines.write("link.target", **about, row=name, found=speedup.value, target=target, holds=holds)
            )
    return written


def _judged(lines: program.Lines, about: dict[str, Any], timings: dict[str, Timing], why: str | None) -> dict[str, Any]:
    """The automatic choice against the best of the others."""
    others = {
        name: timing.median_seconds for name, timing in timings.items() if name in link_steps.EXCHANGES or name == BASE
    }
    best = min(others, key=lambda name: others[name])
    slower = ratio(timings["auto"], timings[best])
    row, limit = f"auto, times {best}", AUTO_WITHIN
    return lines.write(
        "link.target", **about, row=row, found=slower.value, target=limit, holds=slower.value <= limit, why=why
    )  # fmt: skip


def _show(written: Sequence[dict[str, Any]]) -> None:
    program.show(
        "link: milliseconds of a step",
        ("link", "workers", "row", "ms", "x ddp fp32", "MB said", "MB counted"),
        [
            (
                line["link"],
                f"{line['workers']}",
                line["row"],
                f"{line['timing']['median_seconds'] * 1e3:.1f}",
                f"{line['speedup']['ratio']:.2f}" if line["speedup"] else "-",
                f"{line['bytes_said'] / 1e6:.3f}" if line["bytes_said"] else "-",
                f"{line['bytes_counted'] / 1e6:.3f}",
            )
            for line in written
            if line["name"] == "link"
        ],
    )
    program.show(
        "link: targets",
        ("link", "row", "found", "target", "holds"),
        [
            (line["link"], line["row"], f"{line['found']:.2f}", f"{line['target']:g}", "yes" if line["holds"] else "NO")
            for line in written
            if line["name"] == "link.target"
        ],
    )


if __name__ == "__main__":
    sys.exit(program.as_script(main))
