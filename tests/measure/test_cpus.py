import os
from pathlib import Path

import pytest

from noctule.measure.cpus import available_cpus

HERE = len(os.sched_getaffinity(0))


def machine(root: Path, groups: str, **files: str) -> Path:
    """A file system that shows these control groups; a double underscore in a name is a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "share"),
    [
        ("0::/\n", {"cpu_max": "150000 100000\n"}, 2),  # a container of version 2, which sees its own group as the root
        ("0::/\n", {"cpu_max": "max 100000\n"}, 1000),
        ("0::/job/step\n", {"job__step__cpu_max": "max 100000", "job__cpu_max": "100000 100000"}, 1),  # Slurm
        ("0::/gone\n", {}, 1000),
        ("0::/\n", {"cpu_max": "10000 100000\n"}, 1),
        ("not a line\n", {}, 1000),
    ],
)
def test_threads_are_as_many_as_the_group_allows(tmp_path, groups, files, share):
    assert available_cpus(machine(tmp_path, groups, **files)) == min(HERE, share)


def test_groups_of_version_1(tmp_path):
    root = machine(tmp_path, "4:memory:/x\n1:cpu,cpuacct:/job\n")
    folder = root / "sys/fs/cgroup/cpu,cpuacct/job"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    for quota, share in (("100000\n", 1), ("-1\n", 1000)):
        (folder / "cpu.cfs_quota_us").write_text(quota)
        assert available_cpus(root) == min(HERE, share)


def test_a_machine_without_groups(tmp_path):
    assert available_cpus(tmp_path) == HERE


def test_affinity_counts():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
