"""Seconds and bytes of a call on a CPU and, with stand-ins for CUDA's events and allocator, on a GPU; traces."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thriftlab.launch import timing
from thriftlab.launch.gpu import trace

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Queue:
    """A GPU whose work takes time that the host does not see: `work` queues it, an event marks a place."""

    def __init__(self):
        self.clock, self.waited = 100.0, []

    def work(self, milliseconds):
        self.clock += milliseconds

    def synchronize(self):
        self.waited.append(self.clock)


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing, "without it CUDA measures nothing"

        def record(self):
            self.at = queue.clock

        def synchronize(self):
            queue.synchronize()

        def elapsed_time(self, end):
            assert queue.waited and queue.waited[-1] >= end.at, "the end is not reached yet"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.synchronize)
    return queue


def test_a_gpu_counts_its_own_seconds(queue):
    assert timing.timer("cuda:1") is timing.gpu_seconds and timing.timer(CPU) is timing.cpu_seconds
    assert timing.gpu_seconds(lambda: queue.work(250)) == pytest.approx(0.25)
    assert len(queue.waited) == 2, "before, so that nothing earlier is counted, and after"


def test_a_cpu_counts_the_seconds_of_the_process(monkeypatch):
    ticks = iter([5.0, 7.5])
    monkeypatch.setattr(timing.time, "process_time", lambda: next(ticks))
    assert timing.cpu_seconds(lambda: None) == 2.5


def test_who_waits_for_a_result_waits_for_the_gpu(queue, monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", lambda: queue.waited[-1] if queue.waited else 0.0)
    assert timing.wall_seconds(lambda: queue.work(3), CUDA) == 3.0


def test_the_peak_of_a_call_on_a_gpu_is_beyond_what_it_found(monkeypatch):
    held = {"now": 1000, "peak": 9999}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    assert timing.peak_allocation(lambda: held.update(peak=1600), CUDA) == 600


INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1])))


@given(INTERVALS)
def test_the_length_that_intervals_cover(times):
    assert trace.covered(times) == len({point for start, end in times for point in range(start, end)})


def event(kind, name, start, length):
    values = {"activity_type": kind, "name": name, "start_ns": start, "duration_ns": length}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_a_trace_counts_kernels_and_copies_alone(monkeypatch):
    events = [
        event("kernel", "gemm", 0, 10), event("kernel", "gemm", 5, 10), event("gpu_memcpy", "Memcpy DtoH", 30, 10),
        event("gpu_user_annotation", "Optimizer.step", 0, 40), event("cuda_sync", "Stream Sync", 0, 90),
        event("cpu_op", "aten::mm", 0, 500), event("gpu_memset", "Memset", 50, 0),
    ]  # fmt: skip
    watched = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    monkeypatch.setattr(trace, "profile", lambda activities: nullcontext(watched))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = trace.traced(lambda: None, CUDA)
    assert found.kernels == {"gemm": 2, "Memcpy DtoH": 1, "Memset": 1} and found.launches == 4
    assert found.span == pytest.approx(50e-9) and found.busy == pytest.approx(25e-9) and found.idle == 0.5


def test_a_trace_of_a_cpu_counts_operators():
    found = trace.traced(lambda: torch.ones(3) + 1, CPU)
    assert found.kernels["aten::add"] == 1 and 0 <= found.idle < 1
    assert trace.traced(lambda: None, CPU).idle == 0.0


def test_waits_of_the_host_are_counted_and_refused(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with trace.reads(CUDA) as waits:
        for _ in range(3):  # at one place, three times
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert len(waits) == 3 and all(__file__ in place for place in waits)
    with pytest.raises(RuntimeError), trace.no_waiting(CUDA):
        raise RuntimeError("called a synchronizing CUDA operation")
    assert modes == ["warn", "default", "error", "default"]
    with trace.reads(CPU) as waits, trace.no_waiting(CPU):
        torch.ones(1).item()
    assert waits == [] and len(modes) == 4
