"""A training step over links of several kinds: plain data-parallel training, torch's hooks, and Noctule's exchanges."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from noctule.core.errors import UsageError
from noctule.measure import Progress, ratio
from noctule.measure.timing import Timing
from noctule.testing.link import Link, Network, available, shaped_network
from noctule.testing.processes import Workers
from noctule_bench import link_steps, program
from noctule_bench.framing import on_the_wire

BASE = "ddp fp32"
TARGETS = {
    ("100/5", 2): {"natural": 2.5, "top 1 %": 4.0, "PowerSGD 4": 7.0},
    ("20/25", 2): {"natural": 2.8, "top 1 %": 15.0, "PowerSGD 4": 11.0},
    ("100/0", 8): {"natural": 2.5},
}
"""Link and workers -> row -> how many times as fast as plain DDP in float32."""
AUTO_WITHIN, PLAIN_WITHIN = 1.1, 1.05
"""How many times as slow as the best of all ways, and as plain DDP, the automatic choice may be."""
BYTES_WITHIN = 0.03
"""How far the reported bytes with their headers may be from the bytes counted at the interface, and from the formula."""
STAR_ROWS = (BASE, "natural", "natural, all-gather")
_SAME_OF_TWO = "natural, all-gather"
"""What two workers do anyway with the row `natural`."""
_TURN_SECONDS, _MOST_STEPS, _PATIENCE = 0.6, 8, 300.0


def link(
    *,
    links: tuple[str, ...] = ("none", "1000/0.5", "100/5", "20/25"),
    rows: tuple[str, ...] = (),
    workers: int = 2,
    megabytes: float = 10.0,
    stars: tuple[int, ...] = (4, 8),
    star_link: str = "100/0",
    star_megabytes: float = 6.0,
    batch: int = 32,
    rounds: int = 7,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Time a data-parallel training step over shaped links, gradients sent in several ways.

    First over each of some links with all rows; then, with more workers and a smaller model, each with such a link to the middle
    of a star, two ways of compression against plain DDP.

    Args:
        links: MBIT/MS, the bandwidth and the delay one way of each, or none for an unshaped link.
        rows: names of the ways (default: all).
        workers: processes, each in a network namespace of its own.
        megabytes: of the model's weights.
        stars: numbers of workers (none: leave them out).
        star_link: of each of them.
        star_megabytes: of their model.
        batch: rows of each worker's batch.
        rounds: turns of each row.
        threads: of each worker.
        out: a file that the lines are appended to.
    """
    program.at_least_one(workers=workers - 1, batch=batch, rounds=rounds, threads=threads)
    if not min(megabytes, star_megabytes) > 0.0 or min(stars, default=2) < 2:
        raise UsageError(
            f"a model has some megabytes, got {megabytes} and {star_megabytes}; a star has two workers or more, got {stars}"
        )
    if why := available():
        raise UsageError(f"links cannot be shaped here: {why}")
    names = program.chosen(rows, list(link_steps.ROWS))
    pairs = [Setting(text, parsed(text), workers, megabytes, batch) for text in links]
    star = parsed(star_link)
    more = [Setting(star_link, star, world, star_megabytes, max(batch // world, 1)) for world in stars]
    lines = program.Lines(out)
    written: list[dict[str, Any]] = []
    torch.set_num_threads(threads)  # so that the lines say so
    for setting in [*pairs, *more]:
        left_out = [_SAME_OF_TWO] if setting.workers == 2 else [name for name in names if name not in STAR_ROWS]
        chosen = [name for name in names if name not in left_out or (name in rows and setting in pairs)]
        with (
            shaped_network(setting.workers, link=setting.shape) as network,
            Workers(setting.workers, network=network, threads=threads, group_timeout_seconds=_PATIENCE) as group,
        ):
            written += _measure(lines, group, network, chosen, setting, rounds)
    _show(written)


@dataclass(frozen=True)
class Setting:
    """Where rows are compared."""

    link: str
    shape: Link
    workers: int
    megabytes: float
    batch: int

    @property
    def mtu(self) -> int:
        """Bytes of the largest packet that an interface counts."""
        return self.shape.counted_bytes(self.workers)

    @property
    def about(self) -> dict[str, Any]:
        """What every line says."""
        return {"link": self.link, "workers": self.workers, "batch": self.batch}


def parsed(text: str) -> Link:
    """The link that its name says.

    >>> parsed("100/5")
    Link(megabits=100.0, delay_ms=5.0, loss=0.0, mtu=None, seed=0)
    """
    if text == "none":
        return Link()
    try:
        megabits, delay = (float(part) for part in text.split("/"))
        return Link(megabits=megabits, delay_ms=delay, mtu=9000 if megabits > 125.0 else None)
    except ValueError as error:
        raise UsageError(f"a link is MBIT/MS, such as 100/5, or none; got {text!r}") from error


def _measure(
    lines: program.Lines, group: Workers, network: Network, names: Sequence[str], setting: Setting, rounds: int
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in names}
    reported: dict[str, list[float]] = {name: [] for name in names}
    counted: dict[str, list[float]] = {name: [] for name in names}
    weights, steps = 0, {}
    for name in names:
        arguments = (name, setting.megabytes, setting.batch)
        weights = group.call(link_steps.prepare, *arguments, timeout_seconds=_PATIENCE)[0]
        takes = max(group.call(link_steps.warm, name, timeout_seconds=_PATIENCE))
        steps[name] = max(1, min(_MOST_STEPS, round(_TURN_SECONDS / takes)))
    with Progress(rounds * len(names), label=f"link {setting.link}", unit="turns") as progress:
        for _ in range(rounds):
            for name in names:
                if steps[name] > 1:  # where one is long, its beginning does not matter
                    group.call(link_steps.step, name, timeout_seconds=_PATIENCE)
                before = network.bytes_sent(0)
                found = group.call(link_steps.timed, name, steps[name], timeout_seconds=_PATIENCE)
                counted[name].append((network.bytes_sent(0) - before) / steps[name])
                seconds[name].append(max(each["seconds"] for each in found))
                reported[name].append(found[0]["bytes"])
                progress.advance()
    timings = {name: Timing(tuple(each)) for name, each in seconds.items()}
    written = []
    for name, timing in timings.items():
        price = group.call(link_steps.price, name)[0]
        sent, at_interface = median(reported[name]), median(counted[name])
        framed = on_the_wire(sent, messages=price["messages"], mtu=setting.mtu)
        speedup = ratio(timings[BASE], timing) if BASE in timings else None
        line = lines.write(
            "link", **setting.about, row=name, model_bytes=weights, timing=timing, speedup=speedup, steps=steps[name],
            bytes_said=sent, bytes_framed=framed, bytes_counted=at_interface, bytes_formula=price["bytes"],
        )  # fmt: skip
        written.append(line)
        if target := TARGETS.get((setting.link, setting.workers), {}).get(name):
            written.append(_target(lines, setting, name, speedup and speedup.value, target, at_least=True))
        if sent:
            off = abs(framed / at_interface - 1.0)
            written.append(_target(lines, setting, f"{name}: bytes off the counted", off, BYTES_WITHIN))
        if name in STAR_ROWS and sent and setting.workers > 2:
            off = abs(sent / price["bytes"] - 1.0)
            written.append(_target(lines, setting, f"{name}: bytes off the formula", off, BYTES_WITHIN))
    if "auto" in timings:
        written += _judged(lines, setting, timings, group.call(link_steps.why)[0])
    group.call(link_steps.forget)
    return written


def _judged(lines: program.Lines, setting: Setting, timings: dict[str, Timing], why: str) -> list[dict[str, Any]]:
    """The automatic choice against the best of the others, and against plain DDP."""
    others = {name: timing.median_seconds for name, timing in timings.items() if name in {BASE, *link_steps.EXCHANGES}}
    written = []
    for name, limit in ((min(others, key=lambda name: others[name]), AUTO_WITHIN), (BASE, PLAIN_WITHIN)):
        if name in timings:
            slower = ratio(timings["auto"], timings[name])
            row, interval = f"auto, times {name}", [slower.low, slower.high]
            written.append(_target(lines, setting, row, slower.value, limit, interval=interval, why=why))
    return written


def _target(
    lines: program.Lines,
    setting: Setting,
    row: str,
    found: float | None,
    target: float,
    *,
    at_least: bool = False,
    **more: Any,
) -> dict[str, Any]:
    holds = found is not None and (found >= target if at_least else found <= target)
    return lines.write("link.target", **setting.about, row=row, found=found, target=target, holds=holds, **more)


def _show(written: Sequence[dict[str, Any]]) -> None:
    def times(part: str) -> program.Column:
        return lambda line: f"{line['speedup'][part]:.2f}" if line["speedup"] else "-"

    def megabytes(kind: str) -> program.Column:
        return lambda line: f"{line[f'bytes_{kind}'] / 1e6:.3f}" if line["bytes_said"] else "-"

    where = {"link": "{link}", "workers": "{workers}", "row": "{row}"}
    program.table(
        written,
        "link",
        "link: milliseconds of a step, and megabytes that a worker sends in it",
        {
            **where,
            "ms": program.milliseconds(1),
            "x ddp fp32": times("ratio"),
            "from": times("low"),
            "to": times("high"),
            "MB reported": megabytes("said"),
            "framed": megabytes("framed"),
            "counted": lambda line: f"{line['bytes_counted'] / 1e6:.3f}",
        },
    )
    found = {"found": lambda line: "-" if line["found"] is None else f"{line['found']:.3f}"}
    program.targets(written, "link", {**where, **found})
