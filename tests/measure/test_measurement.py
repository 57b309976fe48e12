import json
import mmap
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from noctule.measure import Measurement, measure
from noctule.measure.memory import HighWater, lifetime_peak, resident_bytes, resident_peak, sampled_peak
from noctule.measure.operations import count, listening

MB = 1_000_000


def touch(megabytes, *, seconds=0.0):
    """Make so much memory resident, and let it go: to the system, past an allocator that might keep it."""
    with mmap.mmap(-1, megabytes * MB) as memory:
        for at in range(0, megabytes * MB, mmap.PAGESIZE):
            memory[at] = 1
        time.sleep(seconds)


def rise(cost: Measurement) -> float:
    return (cost.peak_memory_bytes - cost.memory_before_bytes) / MB


def test_memory_that_was_let_go_is_in_the_peak():
    with measure() as cost:
        touch(200)
    assert 195 <= rise(cost) < 300
    assert resident_bytes() - cost.memory_before_bytes < 100 * MB, "the memory is gone by now"


def test_an_inner_peak_is_also_an_outer_one_and_never_the_other_way():
    with measure() as outer:
        touch(200)
        with measure() as first:
            touch(20)
        with measure() as second:
            touch(100)
    assert 195 <= rise(outer) < 300
    assert 15 <= rise(first) < 60
    assert 95 <= rise(second) < 150
    with measure() as outer:
        with measure():
            touch(200)
        with measure():
            touch(20)
    assert 195 <= rise(outer) < 300


def test_memory_held_before_counts_as_part_of_the_peak_not_of_the_rise():
    held = np.ones(100 * MB, np.uint8)
    with measure() as cost:
        touch(50)
    assert cost.peak_memory_bytes > held.nbytes + 45 * MB
    assert rise(cost) < 100


@pytest.mark.parametrize("means", [resident_peak, sampled_peak, lifetime_peak])
def test_each_means_of_finding_the_peak_finds_it(means):
    before = resident_bytes()
    with means() as peak:
        touch(100, seconds=0.05)
    assert peak.peak_bytes >= before + 95 * MB
    assert (peak.note is None) == (means is resident_peak)


@given(st.lists(st.sampled_from(["open", "close"]) | st.integers(0, 100), max_size=30))
def test_watchers_of_one_mark_each_see_the_peak_of_their_own_time(events):
    level = mark = 0

    def reset():
        nonlocal mark
        mark = level

    water = HighWater(lambda: mark, reset)
    stack = []
    for event in events:
        if event == "open":
            context = water.watching()
            stack.append((context, context.__enter__(), [level]))
        elif event == "close":
            if stack:
                context, peak, seen = stack.pop(0)  # not only nested: also overlapping, as in threads
                context.__exit__(None, None, None)
                assert peak.peak_bytes == max(seen)
        else:
            level, mark = event, max(mark, event)
            for _, _, seen in stack:
                seen.append(level)


def test_time_on_the_clock_and_on_the_cores():
    clock, cores = time.perf_counter(), time.process_time()
    with measure() as cost:
        time.sleep(0.1)
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    assert 0.149 < cost.seconds < time.perf_counter() - clock
    assert 0.049 < cost.cpu_seconds < time.process_time() - cores


def test_an_exception_still_fills_in_the_numbers():
    def fail():
        touch(50)
        count(3)
        raise KeyError

    with pytest.raises(KeyError), measure(dense_operations=True) as cost:
        fail()
    assert cost.seconds > 0
    assert rise(cost) > 45
    assert cost.multiply_adds == 3


def test_operations_add_up_over_nested_blocks_and_threads():
    count(1)
    with measure() as outer:
        count(10)
        with measure() as inner:
            count(100)
            threads = [threading.Thread(target=lambda: [count(1) for _ in range(1000)]) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        count(20)
    count(1)
    assert inner.multiply_adds == 4100
    assert outer.multiply_adds == 4130


def test_counting_costs_next_to_nothing_while_nobody_listens():
    def seconds():
        start = time.thread_time()
        for _ in range(10_000):
            count(5)
        return time.thread_time() - start

    assert min(seconds() for _ in range(5)) / 10_000 < 2e-6


def test_dense_operations_are_those_of_the_matrix_products():
    model = nn.Linear(30, 20)
    x = torch.randn(8, 30, requires_grad=True)
    with measure(dense_operations=True) as outer:
        with measure(dense_operations=True) as forward:
            y = model(x)
        with measure() as not_counted:
            y.sum().backward()
    assert forward.multiply_adds == 8 * 30 * 20
    assert outer.multiply_adds == 3 * forward.multiply_adds
    assert not_counted.multiply_adds == 0


def test_listening_ends_with_the_block():
    with listening() as counter:
        count(2)
    count(3)
    assert counter.multiply_adds == 2


def test_a_measurement_reads_well():
    with measure() as cost:
        pass
    assert json.loads(json.dumps(cost.as_dict())) == cost.as_dict()
    assert "MiB" in str(cost)
    assert ("joules not available" in str(cost)) == (cost.joules is None)
    assert "peak memory not available" in str(Measurement())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_peaks_of_cuda_memory_nest():
    torch.cuda.init()
    with measure() as outer:
        with measure() as first:
            torch.empty(100 * MB, dtype=torch.uint8, device="cuda")
        with measure() as second:
            torch.empty(10 * MB, dtype=torch.uint8, device="cuda")
    assert outer.peak_cuda_bytes == first.peak_cuda_bytes >= 100 * MB
    assert second.peak_cuda_bytes < 100 * MB
