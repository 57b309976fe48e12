"""A result as one line of JSON, with the machine and the commit it was measured on."""

import functools
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """The machine, threads and load of this process, as plain JSON."""
    return {
        **_fixed(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def result_line(name: str, **figures: Any) -> str:
    """One line of JSON: the name, the figures, the machine with its commit.

    Figures may be anything with `as_dict()` (a Timing, a Footprint, a Measurement) or `item()` (a small tensor); NaN
    and infinity become null.

    >>> json.loads(result_line("layers", density=0.05))["density"]
    0.05
    """
    if taken := {"name", "machine"} & figures.keys():
        raise ValueError(f"the figures of {name!r} cannot be called {', '.join(sorted(taken))}: the line has such")
    return json.dumps({"name": name, **_plain(figures), "machine": machine()}, allow_nan=False)


def _plain(value: Any) -> Any:
    if hasattr(value, "as_dict"):
        return _plain(value.as_dict())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@functools.cache
def _fixed() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(Path(__file__).resolve()),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit(file: Path) -> str | None:
    """The commit of the work tree that a file is tracked in ("-dirty" after changes), or None where there is none."""
    try:
        for command in (["ls-files", "--error-unmatch", file.name], ["describe", "--always", "--dirty", "--exclude=*"]):
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(file.parent), *command],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
