"""Does a step cost in proportion to the weights? Networks from half a million to a hundred million neurons."""

import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from noctule.core.errors import UsageError
from noctule.data.prototypes import Prototypes
from noctule.measure import footprint, interleave, measure
from noctule.measure.activations import kept_for_backward
from noctule.measure.allocator import keep_memory
from noctule.measure.turns import Process, Unavailable, Workers
from noctule.recipes.bat_brain_network import Brain, connected, momentum_sgd
from noctule_bench import program

TARGET = 0.15
"""How far a step may be from proportional to the weights, once a layer's activations no longer fit the cache."""

PROCESS = Process("noctule")
CACHE_BYTES = 32 << 20
"""Where the system does not say how large its last cache is."""


def bat_brain(
    *,
    millions: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
    layers: int = Brain.layers,
    epsilon: float = Brain.epsilon,
    features: int = Brain.features,
    batch: int = 8,
    threads: tuple[int, ...] = (1, 2),
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """Time the training steps of networks of growing size, each in a process of its own, and weigh them.

    Args:
        millions: of neurons.
        layers: hidden layers, all of the same width.
        epsilon: each layer has epsilon (inputs + outputs) weights.
        features: numbers in a sample.
        batch: samples in a step.
        threads: numbers of threads that take turns.
        rounds: steps that are timed, for each number of threads.
        out: a file that the lines are appended to.
    """
    program.at_least_one(batch=batch, rounds=rounds, threads=min(threads, default=0), millions=len(millions))
    try:
        brains = [
            Brain(neurons=round(n * 1e6), layers=layers, epsilon=epsilon, features=features) for n in sorted(millions)
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error
    lines = program.Lines(out)
    cache = last_cache_bytes()
    written = [line for brain in brains for line in _sized(lines, brain, batch, threads, rounds, cache)]
    written += [line for n in threads for line in _judged(lines, written, n)]
    _show(written)


def weigh(brain: Brain, batch: int, threads: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """What a network takes to make and to train; for a fresh process."""
    with keep_memory(), measure() as cost:
        started = time.perf_counter()
        model = brain.model(seed=0)
        optimizer = momentum_sgd(model)
        alive = connected(model)  # which also builds the index of every transpose
        seconds = time.perf_counter() - started
        data, numbers = Prototypes(features=brain.features, classes=brain.classes), count()

        def step(threads: int) -> int:
            torch.set_num_threads(threads)
            inputs, targets = data.batch("train", next(numbers), batch)
            optimizer.zero_grad(set_to_none=True)
            with kept_for_backward(model) as kept:
                loss = cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            return kept.nbytes

        activation_bytes = step(max(threads))
        timings = interleave({str(n): partial(step, n) for n in threads}, rounds=rounds, warmup=1)
    return {
        "timings": timings,
        "seconds_to_make": seconds,
        "connected_neurons": alive,
        "activation_bytes": activation_bytes,
        "peak_memory_bytes": cost.peak_memory_bytes,
        **footprint(model, optimizer, all_gradients=True).as_dict(),
    }


def last_cache_bytes() -> int:
    """Bytes of the largest cache that a core has a part in."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units), default=CACHE_BYTES)


def deviations(points: dict[int, float], outside: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Seconds for a weight, fitted to the points outside the cache, and how far each point is from that line.

    >>> slope, off = deviations({10: 1.0, 100: 20.0, 200: 40.0}, [100, 200])
    >>> round(slope, 6), {weights: round(x, 6) for weights, x in off.items()}
    (0.2, {10: -0.5, 100: 0.0, 200: 0.0})
    """
    slope = geometric_mean(points[weights] / weights for weights in outside)
    return slope, {weights: seconds / (slope * weights) - 1.0 for weights, seconds in points.items()}


def _sized(lines: program.Lines, brain: Brain, batch: int, threads: tuple[int, ...], rounds: int, cache: int):
    """The lines of one size: one for each number of threads, or what went wrong."""
    about = {"neurons": brain.neurons, "layers": brain.layers, "weights": brain.weights, "batch": batch}
    layer_bytes = max(brain.widths[1:-1]) * batch * 4
    about |= {"layer_activation_bytes": layer_bytes, "cache_bytes": cache, "outside_cache": layer_bytes > cache}
    with Workers(max(threads)) as workers:
        try:
            found = workers.run(PROCESS, weigh, brain, batch, threads, rounds)
        except Unavailable as error:  # it died: too large for this machine
            yield lines.write("bat_brain", row=f"{brain.neurons:,} neurons", **about, error=str(error))
            return
    for n, timing in found.pop("timings").items():
        torch.set_num_threads(int(n))  # so that the line says so
        yield lines.write("bat_brain", threads=int(n), **about, timing=timing, **found)


def _judged(lines: program.Lines, written: Sequence[dict[str, Any]], threads: int):
    """One line: how far from proportional; none where no size is outside the cache."""
    own = [line for line in written if line.get("threads") == threads]
    points = {line["weights"]: line["timing"]["median_seconds"] for line in own}
    outside = [line["weights"] for line in own if line["outside_cache"]]
    if not outside:
        return
    slope, off = deviations(points, outside)
    largest = max(abs(off[weights]) for weights in outside)
    torch.set_num_threads(threads)
    yield lines.write(
        "bat_brain.linear",
        threads=threads,
        seconds_per_weight=slope,
        deviations=off,
        outside_cache=outside,
        largest_deviation=largest,
        target=TARGET,
        holds=largest <= TARGET,
    )


def _show(written: Sequence[dict[str, Any]]) -> None:
    linear = {line["threads"]: line for line in written if line["name"] == "bat_brain.linear"}
    sizes = [line for line in written if line["name"] == "bat_brain" and "error" not in line]

    def row(line: dict[str, Any]) -> tuple[str, ...]:
        seconds, weights = line["timing"]["median_seconds"], line["weights"]
        off = linear[line["threads"]]["deviations"][str(weights)] if line["threads"] in linear else None
        return (
            f"{line['neurons'] / 1e6:g} M",
            f"{weights / 1e6:,.1f} M",
            str(line["threads"]),
            f"{seconds:.3f}",
            f"{seconds / weights * 1e9:.1f}",
            "-" if off is None else f"{off:+.0%}" + ("" if line["outside_cache"] else " (cache)"),
            f"{line['total_bytes'] / 1e9:.2f}",
            f"{line['activation_bytes'] / 1e9:.2f}",
            f"{line['peak_memory_bytes'] / 1e9:.2f}",
        )

    heads = ("neurons", "weights", "threads", "s/step", "ns/weight", "off the line", "held", "activations", "peak GB")
    program.show("bat brain: a training step, and gigabytes", heads, [row(line) for line in sizes])
    program.show(
        "bat brain: seconds in proportion to the weights, where a layer's activations are larger than the cache",
        ("threads", "ns/weight", "largest deviation", "target", "holds"),
        [
            (
                str(n),
                f"{line['seconds_per_weight'] * 1e9:.1f}",
                f"{line['largest_deviation']:.0%}",
                f"{TARGET:.0%}",
                "yes" if line["holds"] else "NO",
            )
            for n, line in linear.items()
        ],
    )
    program.show_errors(written)
