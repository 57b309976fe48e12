"""``noctule doctor``: what this machine and this installation can do."""

import inspect
import os
import sys
from pathlib import Path

from noctule.cli.signature import Parser
from noctule.cli.threads import how_threads_wait


def main(words: list[str]) -> int:
    """Say what this machine and this installation can do."""
    Parser(prog="noctule doctor", description=inspect.getdoc(main)).parse_args(words)
    for name, finding in _findings().items():
        print(f"{name:<18} {finding}")
    return 0


def _findings() -> dict[str, str]:
    """The state of each thing that matters for speed and for measuring."""
    import torch

    from noctule.measure import machine, measure
    from noctule.measure.cpus import available_cpus

    about = machine()
    with measure() as cost:
        torch.ones(1)
    return {
        "processor": f"{about.get('cpu')}, {os.cpu_count()} cores, of which this process may use {available_cpus()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "python": sys.version.split()[0],
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "idle threads": how_threads_wait(),
        "compiled kernels": _kernels(),
        "OpenMP runtimes": _openmp(),
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "not available",
        "peak memory": "measured" if cost.peak_memory_bytes else "not available",
        "energy": "measured" if cost.joules is not None else "not available (no readable RAPL counter)",
        "data": os.environ.get("NOCTULE_DATA")
        or "NOCTULE_DATA is not set: data sets are looked for in the cache, then downloaded",
    }


def _kernels() -> str:
    from noctule.kernels import native

    if native._native is None:
        return "missing: products run in plain torch, slowly. Install Noctule with pip where a C++ compiler is at hand"
    return f"{native.instruction_set()} (this machine can run {', '.join(native._native.instruction_sets())})"


def _openmp() -> str:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return "not known"
    libraries = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libomp" in line}
    names = ", ".join(sorted(Path(library).name for library in libraries))
    return f"one: {names}" if len(libraries) == 1 else f"{len(libraries)} ({names}): more than one wait for each other"
