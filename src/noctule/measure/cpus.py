"""How many processors this process may use: those it is allowed on, as far as its control group's share of time goes."""

import os
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """At least 1; a container that may use one and a half processors has 2.

    Args:
        root: of the file system in which Linux shows control groups.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [share for share in _shares(root) if share > 0.0]
    return max(1, min(allowed, *(int(-(-share // 1)) for share in shares)) if shares else allowed)


def _shares(root: Path) -> list[float]:
    """Processors' worth of time that this process's control group, and each one above it, may use."""
    found = []
    for hierarchy, names, path in _groups(root):
        mounted = root / "sys/fs/cgroup" / (names if hierarchy != "0" else "")
        inside = Path(path.lstrip("/"))
        for folder in (mounted / inside, *(mounted / parent for parent in inside.parents), mounted):
            try:
                if hierarchy == "0":
                    quota, period = (folder / "cpu.max").read_text().split()
                else:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                found.append(float(quota) / float(period))
            except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max": no limit
                continue
    return found


def _groups(root: Path) -> list[tuple[str, str, str]]:
    """Of version 2 (hierarchy 0) and, of version 1, that of processors: hierarchy, controllers, path."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    groups = [tuple(line.split(":", 2)) for line in lines if line.count(":") >= 2]
    return [(a, b, c) for a, b, c in groups if a == "0" or "cpu" in b.split(",")]
