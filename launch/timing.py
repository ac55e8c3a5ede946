"""How long a call takes and how much memory it needs at most, as the device tells it.

On a CPU that is the time of the process and what torch's profiler says of memory; on a GPU the time between two CUDA
events and what the allocator says. The surprise: on a GPU the host runs ahead, so its own clock would measure how fast
work is queued; an event is a mark in the queue itself.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


def timer(device: torch.device | str) -> Callable[[Call], float]:
    """The function that measures the seconds of a call on this device."""
    return gpu_seconds if torch.device(device).type == "cuda" else cpu_seconds


def cpu_seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def gpu_seconds(call: Call) -> float:
    """From when the GPU begins what the call has queued until it has done it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # from milliseconds


def wall_seconds(call: Call, device: torch.device | str) -> float:
    """As somebody who waits for the result sees it, the host's own work included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else int
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def peak_allocation(call: Call, device: torch.device | str = "cpu") -> int:
    """Bytes that a call holds at most beyond what it found."""
    return gpu_peak(call) if torch.device(device).type == "cuda" else cpu_peak(call)


def gpu_peak(call: Call) -> int:
    torch.cuda.synchronize()
    found = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - found


def cpu_peak(call: Call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
