"""Workers that do not wait for one another: pace and accuracy of two workers of one thread each, against one worker of one thread.

A truly sparse MLP (784-1000-1000-10 at 5 %, momentum SGD, All-ReLU, SET after every epoch), one worker on all the data, or two on
half of it each: WASAP-SGD, Downpour and SSP on a parameter server, and two that have nothing to do with one another, which is as
fast as two can be here; and a dense 784-64-10 one by L-BFGS on the whole data set, with torch alone and with Sandblaster.
Trainings of one seed are made one right after the other.
"""

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from noctule.codecs import Cast
from noctule.measure.paired import interval
from noctule.parallel import coordinate
from noctule.testing.processes import Workers
from noctule_bench import program
from noctule_bench.asynchronous_jobs import SGD, minimised, trained

BOUNDS: dict[str, int | None] = {"wasap": None, "downpour": None, "ssp": 3}
METHODS = ("one", "apart", *BOUNDS, "lbfgs", "sandblaster")
TWINS = {**dict.fromkeys(("apart", *BOUNDS), "one"), "sandblaster": "lbfgs"}
"""What each is compared with."""
POINTS = {"wasap": 0.3, "downpour": 0.5, "ssp": 0.5, "sandblaster": 0.5}
"""By how much accuracy may be lower."""
PACE = 1.6
"""How many times the samples of one worker WASAP should train on in a second."""
SECONDS = 1800.0


def asynchronous(
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    epochs: int = 15,
    apart: int = 8,
    apart_wasap: int = 64,
    overlap: bool = True,
    bf16: bool = True,
    steps: int = 10,
    iterations: int = 20,
    out: Path | None = None,
) -> None:
    """Compare WASAP, Downpour, SSP and Sandblaster on two workers with one worker: samples per second and accuracy, in pairs.

    Args:
        data: a data set.
        data_dir: where it is looked for first.
        methods: one, apart, wasap, downpour, ssp, lbfgs, sandblaster (default: all).
        seeds: one training of each method for each.
        epochs: over all the data, of all workers together.
        apart: steps from one push and pull to the next.
        apart_wasap: the same, for WASAP, whose second phase makes up for it.
        overlap: take the answer to a push with the next one, where there is no bound.
        bf16: push gradients of 16 bits.
        steps: of L-BFGS.
        iterations: in each of these.
        out: a file that the lines are appended to.
    """
    program.at_least_one(
        epochs=epochs, apart=apart, apart_wasap=apart_wasap, steps=steps, iterations=iterations, seeds=len(seeds)
    )
    chosen, lines = program.chosen(methods, METHODS), program.Lines(out)
    plan = {"data": data, "data_dir": data_dir and str(data_dir), "epochs": epochs, "apart": apart, "overlap": overlap}
    plan["bf16"] = bf16
    plan |= {"steps": steps, "iterations": iterations}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    torch.set_num_threads(1)  # as in the workers
    with Workers(2) as group:
        for seed in seeds:
            for method in chosen:
                plan["apart"] = apart_wasap if method == "wasap" else apart
                asked = {**plan, "seed": seed, "method": method, "bound": BOUNDS.get(method)}
                outcomes = _run(group, method, asked)
                line = {
                    "method": method,
                    "seed": seed,
                    "workers": len(outcomes),
                    "accuracy": outcomes[0]["accuracy"],
                    "seconds": max(outcome["seconds"] for outcome in outcomes),
                }
                if "samples" in outcomes[0]:
                    line["samples_per_second"] = sum(outcome["samples"] for outcome in outcomes) / line["seconds"]
                    line["staleness"] = outcomes[0]["staleness"]
                found[method, seed] = lines.write("asynchronous", **{**plan, **line})
    _show(lines, found, chosen, seeds)


def _run(group: Workers, method: str, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The outcomes of all workers."""
    if method in ("one", "lbfgs"):
        return [(trained if method == "one" else minimised)(0, 1, plan)]
    from noctule.parallel.server.listen import serve

    with tempfile.TemporaryDirectory() as tickets:
        coding = Cast(torch.bfloat16) if plan["bf16"] else None
        lbfgs = partial(torch.optim.LBFGS, max_iter=plan["iterations"], history_size=10, line_search_fn="strong_wolfe")
        with coordinate(lbfgs) if method == "sandblaster" else serve(SGD, workers=2, codec=coding) as server:
            for worker in range(2):
                server.ticket(worker).save(Path(tickets, str(worker)))
            function = minimised if method == "sandblaster" else trained
            return group.call(function, {**plan, "tickets": tickets}, timeout_seconds=SECONDS)


def _show(
    lines: program.Lines, found: dict[tuple[str, int], dict[str, Any]], methods: Sequence[str], seeds: Sequence[int]
) -> None:
    rows = []
    for method in methods:
        cell, twin = [found[method, seed] for seed in seeds], TWINS.get(method)
        mean, seconds = (statistics.fmean(line[name] for line in cell) for name in ("accuracy", "seconds"))
        shown, pace, holds = "", "", []
        line: dict[str, Any] = {"method": method, "accuracy": mean, "seconds": seconds, "seeds": list(seeds)}
        if twin in methods:
            pairs = [(found[method, seed], found[str(twin), seed]) for seed in seeds]
            difference = interval([(a["accuracy"], b["accuracy"]) for a, b in pairs])
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
            low, high = difference["interval_points"] or (None, None)
            shown = f"{difference['difference_points']:+.2f}" + (
                f" [{low:+.2f}, {high:+.2f}]" if low is not None else ""
            )
            pace = f"{ratio:.2f}x"
            line |= {**difference, "times_as_fast": ratio}
            if method in POINTS:
                line["accuracy_holds"] = difference["difference_points"] >= -POINTS[method]
                holds.append(line["accuracy_holds"])
            if method == "wasap":
                line["pace_holds"] = ratio >= PACE
                holds.append(line["pace_holds"])
        lines.write("asynchronous.row", **line)
        verdict = "" if not holds else "yes" if all(holds) else "NO"
        rows.append((method, f"{100 * mean:.2f} %", shown, f"{seconds:.1f} s", pace, verdict))
    program.show(
        f"asynchronous: means of {len(seeds)} seeds; differences in points, 95 % intervals; times as fast, medians",
        ("method", "accuracy", "- its twin", "training", "times as fast", "holds"),
        rows,
    )
