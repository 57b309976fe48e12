"""The versions and the host of a run, as recorded in `run.json`."""

import importlib.metadata
import os
import platform
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of Python, torch and Noctule."""
    import torch

    try:
        noctule = importlib.metadata.version("noctule")
    except importlib.metadata.PackageNotFoundError:
        noctule = "from source"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "noctule": noctule}


def machine() -> dict[str, str | int | None]:
    """The processor's name, the number of its cores and the operating system."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
