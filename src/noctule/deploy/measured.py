"""A file measured by a process of its own: ``python -m noctule.deploy.measured FOLDER``, started by `card_of`.

It imports numpy and the runtime, and no torch where the runtime does without. It reads ``job.json``, ``batch.npz`` and
``inputs.npz`` in the folder, writes ``outputs.npy`` there, and prints a line of JSON for each event.
"""

import json
import math
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

WARM_SHARE, FEWEST, MOST = 0.2, 10, 2000
"""Of the time, calls that are not counted; and the fewest and the most calls that are."""
WANTED = [
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
]


def peak_bytes() -> int | None:
    """The most resident memory that this process has had, or None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def read(file: Path, named: bool) -> Any:
    """Inputs as they were given: by their names, or in their order."""
    with np.load(file) as stored:
        inputs = {name: stored[name] for name in stored.files}
    return inputs if named else tuple(inputs.values())


def resized(inputs: Any, size: int, start: int = 0) -> Any:
    """So many samples from one on, over and over where there are fewer."""
    if isinstance(inputs, dict):
        return {name: resized(x, size, start) for name, x in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(resized(x, size, start) for x in inputs)
    return np.ascontiguousarray(np.take(inputs, np.arange(start, start + size), axis=0, mode="wrap"))


def main(folder: Path) -> None:
    """Measure, and say what was found."""
    job = json.loads((folder / "job.json").read_text())
    largest = read(folder / "batch.npz", job["named"])
    empty = peak_bytes()
    from noctule.deploy.targets import named  # after the memory of a process with numpy was read

    target = named(job["to"])
    start = time.perf_counter()
    import_module(target.module)
    imported = time.perf_counter()
    run = target.open(Path(job["path"]), job["threads"])
    loaded = time.perf_counter()
    say(event="loaded", import_seconds=imported - start, load_seconds=loaded - imported, empty_bytes=empty)
    for size in job["batch_sizes"]:
        batch = resized(largest, size)
        try:
            say(event="batch", batch=size, **latency(run, batch, job["seconds"]), peak_bytes=peak_bytes())
        except Exception as error:  # such as a file for batches of one size
            say(event="batch", batch=size, error=f"{type(error).__name__}: {error}"[:500])
    if job["outputs"]:
        inputs, step, samples = read(folder / "inputs.npz", job["named"]), job["outputs"], job["samples"]
        parts = [run(resized(inputs, step, at))[: samples - at] for at in range(0, samples, step)]
        np.save(folder / "outputs.npy", np.concatenate(parts))
    say(event="done", torch_loaded="torch" in sys.modules, versions={"numpy": np.__version__}, flags=flags())


def latency(run: Any, batch: Any, seconds: float) -> dict[str, Any]:
    """Percentiles of the time of a call, and processor time a call."""
    until = time.perf_counter() + WARM_SHARE * seconds
    run(batch)
    while time.perf_counter() < until:
        run(batch)
    say(event="start")
    times: list[int] = []
    busy, until = time.process_time(), time.perf_counter() + seconds
    while len(times) < FEWEST or (time.perf_counter() < until and len(times) < MOST):
        begin = time.perf_counter_ns()
        run(batch)
        times.append(time.perf_counter_ns() - begin)
    busy = time.process_time() - busy
    say(event="end")
    p50, p90, p99 = (float(x) / 1e6 for x in np.percentile(times, (50, 90, 99)))
    return {"calls": len(times), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "cpu_seconds": busy / len(times)}


def flags() -> list[str]:
    """What of the processor's instructions matters for inference."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    found = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [flag for flag in WANTED if flag in found]


def say(**entries: Any) -> None:
    """A line of JSON."""
    print(
        json.dumps({k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in entries.items()}),
        flush=True,
    )


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as problem:  # of the runtime, whatever it raises: the parent says it
        say(event="error", error=f"{type(problem).__name__}: {problem}"[:2000])
        sys.exit(1)
