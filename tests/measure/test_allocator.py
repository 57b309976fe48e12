"""Freed memory that is kept."""

import subprocess
import sys

import pytest

from noctule.measure.allocator import keep_freed_memory

PROGRAM = """
import resource, torch
from noctule.measure.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():
    several = [torch.ones(1_700_000 + 1_000 * i) for i in range(12)]
    while several:
        several.pop()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_the_next_steps_need_hardly_a_new_page():
    def faults(keep):
        text = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, check=True, text=True
        )
        return int(text.stdout)

    kept, default = faults(True), faults(False)
    assert kept < default / 2, (kept, default)


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
