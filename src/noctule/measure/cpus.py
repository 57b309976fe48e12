"""The number of processors this process may use, by its affinity and the quota of its control group."""

import os
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """The processors of this process, at least 1; a quota of one and a half is 2.

    Args:
        root: of the file system in which Linux shows control groups.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [share for share in _shares(root) if share > 0.0]
    return max(1, min(allowed, *(int(-(-share // 1)) for share in shares)) if shares else allowed)


def _shares(root: Path) -> list[float]:
    """The quotas, in processors, of this process's control group and its parents."""
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
    """The control groups of this process that limit processor time: hierarchy (0 is version 2), controllers, path."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    groups = [tuple(line.split(":", 2)) for line in lines if line.count(":") >= 2]
    return [(a, b, c) for a, b, c in groups if a == "0" or "cpu" in b.split(",")]
