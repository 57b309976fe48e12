"""What training together costs in accuracy and brings in time: four workers against one on the same batches, in pairs.

Each seed trains a dense MLP (784-300-100-10) and a truly sparse one (784-1000-1000-10 at 4.5 %, connections moved by GSE) on one
worker, and on four that share every batch, with several things on the wire. Then, on a shaped link, how long until the dense one
reaches an accuracy: with torch's DistributedDataParallel in fp32, whose steps are those of one worker and take what a few of them
were measured to take, and with what needs the link least.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from noctule.measure.paired import interval
from noctule.testing.link import Link, available, shaped_network
from noctule.testing.processes import Workers
from noctule_bench import program
from noctule_bench.together_jobs import plain_steps, raced, trained

METHODS: dict[str, dict[str, Any]] = {
    "one": {},
    "fp32": {"strategy": "sync", "codec": "none"},
    "natural": {"strategy": "sync", "codec": "natural"},
    "topk": {"strategy": "sync", "codec": "topk"},
    "powersgd": {"strategy": "sync", "codec": "powersgd"},
    "diloco": {
        "strategy": "diloco",
        "meet": 100,
        "outer_momentum": 0.5,
    },  # in some hundred meetings 0.9 does not pay off
    "local": {"strategy": "local", "meet": 100},
}
TARGET_POINTS = 0.3
"""The mean accuracy of all seeds may be lower by so much."""
SECONDS = 1800.0
"""For one training."""


def together(
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    kinds: tuple[str, ...] = ("dense", "sparse"),
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    workers: int = 4,
    epochs: int = 20,
    batch: int = 128,
    reach: float = 0.88,
    look_every: int = 100,
    link: tuple[str, ...] = ("diloco", "local", "topk"),
    megabits: float = 20.0,
    delay_ms: float = 25.0,
    out: Path | None = None,
) -> None:
    """Compare several workers with one on the same batches, in pairs of equal seeds, and the time to an accuracy on a slow link.

    Trainings that are in the output file already are not made again, so a stopped benchmark goes on where it was.

    Args:
        data: a data set.
        data_dir: where it is looked for first.
        kinds: dense, sparse.
        methods: one, fp32, natural, topk, powersgd, diloco, local (default: all).
        seeds: one training of each method for each.
        workers: how many share each batch.
        epochs: of each training.
        batch: samples of all workers together.
        reach: the validation accuracy whose time is measured.
        look_every: steps from one look at it to the next.
        link: methods that are timed on the shaped link, with two workers (none: no shaped link).
        megabits: of that link, per second.
        delay_ms: of that link, one way.
        out: a file that the lines are appended to.
    """
    program.at_least_one(workers=workers, epochs=epochs, batch=batch, look_every=look_every, seeds=len(seeds))
    chosen, kinds = program.chosen(methods, list(METHODS)), tuple(program.chosen(kinds, ["dense", "sparse"]))
    lines, found = program.Lines(out), {_key(line): line for line in program.read(out, "together")}
    common = {"data": data, "epochs": epochs, "batch": batch, "reach": reach, "look_every": look_every}
    plan = {**common, "data_dir": data_dir and str(data_dir)}
    torch.set_num_threads(1)  # as in the workers
    with Workers(workers) as group:
        for seed in seeds:
            for kind in kinds:
                for method in chosen:
                    count = 1 if method == "one" else workers
                    line = {**common, "kind": kind, "method": method, "workers": count, "seed": seed}
                    if _key(line) not in found:
                        asked = {**plan, "kind": kind, "seed": seed, "strategy": METHODS[method]}
                        first = (
                            trained(0, 1, asked)
                            if count == 1
                            else group.call(trained, asked, timeout_seconds=SECONDS)[0]
                        )
                        found[_key(line)] = lines.write("together", **line, **first)
    _show(lines, found, common, kinds, chosen, seeds, workers)
    chosen_on_link = program.chosen(link, [m for m in METHODS if m != "one"]) if link else []
    if chosen_on_link and (missing := available()):
        print(f"no shaped link: {missing}", file=sys.stderr)
    elif chosen_on_link:
        one = [found.get(_key({**common, "kind": "dense", "method": "one", "workers": 1, "seed": s})) for s in seeds]
        steps = [line["reached"][0] for line in one if line and line["reached"]]
        if steps:
            shape = Link(megabits=megabits, delay_ms=delay_ms)
            _race(lines, {**plan, "kind": "dense", "seed": seeds[0]}, shape, chosen_on_link, statistics.median(steps))


def _race(lines: program.Lines, plan: dict[str, Any], shape: Link, methods: Sequence[str], steps: float) -> None:
    """Seconds to the accuracy on the shaped link."""
    rows = []
    with shaped_network(2, link=shape) as network, Workers(2, network=network, group_timeout_seconds=120.0) as group:
        taken, _ = group.call(plain_steps, plan, 10, timeout_seconds=SECONDS)
        plain = statistics.median(taken) * steps
        where = {"megabits": shape.megabits, "delay_ms": shape.delay_ms, "reach": plan["reach"]}
        lines.write("together.race", method="ddp fp32", **where, steps=steps, step_seconds=taken, seconds=plain)
        rows.append(("ddp fp32", f"{steps:.0f}", f"{plain:.1f} s (steps x median step)", ""))
        for method in methods:
            first, *_ = group.call(raced, {**plan, "strategy": METHODS[method]}, timeout_seconds=SECONDS)
            count, seconds = first or (None, None)
            ratio = plain / seconds if seconds else None
            lines.write("together.race", method=method, **where, steps=count, seconds=seconds, ratio=ratio)
            shown = ("not reached", "") if seconds is None else (f"{seconds:.1f} s", f"{ratio:.1f}x")
            rows.append((method, str(count), *shown))
    title = f"time to {plan['reach']:.0%} on {shape.megabits:g} Mbit/s, {shape.delay_ms:g} ms, two workers, dense MLP"
    program.show(title, ("method", "steps", "seconds", "ratio"), rows)


def _show(
    lines: program.Lines,
    found: dict[Any, dict[str, Any]],
    common: dict[str, Any],
    kinds: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    workers: int,
) -> None:
    rows = []
    for kind in kinds:
        cells = {
            m: [
                found[_key({**common, "kind": kind, "method": m, "workers": 1 if m == "one" else workers, "seed": s})]
                for s in seeds
            ]
            for m in methods
        }
        for method, cell in cells.items():
            mean = statistics.fmean(line["accuracy"] for line in cell)
            sent = statistics.fmean(line["sent_bytes_per_step"] for line in cell)
            line: dict[str, Any] = {"kind": kind, "method": method, "workers": cell[0]["workers"], "accuracy": mean}
            shown = ""
            if method != "one" and "one" in cells:
                pairs = [(a["accuracy"], b["accuracy"]) for a, b in zip(cell, cells["one"], strict=True)]
                difference = interval(pairs)
                low, high = difference["interval_points"] or (None, None)
                line |= {**difference, "holds": difference["difference_points"] >= -TARGET_POINTS}
                shown = f"{difference['difference_points']:+.2f}" + (
                    f" [{low:+.2f}, {high:+.2f}]" if low is not None else ""
                )
            bits = 8 * sent / cell[0]["weights"]
            lines.write(
                "together.row", **common, **line, seeds=list(seeds), sent_bytes_per_step=sent, sent_bits_per_number=bits
            )
            holds = {True: "yes", False: "NO", None: ""}[line.get("holds")]
            rows.append((kind, method, str(line["workers"]), f"{100 * mean:.2f} %", shown, f"{bits:.2f}", holds))
    program.show(
        f"together: accuracy on the test set, means of {len(seeds)} seeds; differences from one worker in points, 95 % intervals",
        ("network", "on the wire", "workers", "accuracy", "- one", "bits sent a number and step", "within 0.3"),
        rows,
    )


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("data", "epochs", "batch", "kind", "method", "workers", "seed"))
