"""What a GPU did during a call: its kernels by name, how long it was idle, how often the host waited for it.

On a CPU, for rehearsals, operators take the place of kernels, and nobody waits.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WORK = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}  # kinds of events, as Kineto names them


@dataclass(frozen=True)
class Trace:
    """One call. Copies and fills by the driver count as kernels."""

    kernels: Counter[str]
    span: float  # seconds from the beginning of the first to the end of the last
    busy: float  # of these, in which any ran

    @property
    def launches(self) -> int:
        return self.kernels.total()

    @property
    def idle(self) -> float:
        """Share of the span."""
        return 1 - self.busy / self.span if self.span else 0.0


def traced(call: Callable[[], Any], device: torch.device) -> Trace:
    """Calls it once, with the host's overhead of the profiler."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as watched:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    work = [event for event in events if is_work(event, device.type)]
    times = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in work]
    span = max(end for _, end in times) - min(start for start, _ in times) if times else 0
    return Trace(Counter(event.name() for event in work), span / 1e9, covered(times) / 1e9)


def is_work(event: Any, kind: str) -> bool:
    """Whether the device computed or copied; not a mark of a span of time, or somebody who waits."""
    if hasattr(event, "activity_type"):
        return event.activity_type() in WORK[kind]
    return event.device_type().name.lower() == kind and not event.is_user_annotation()  # torch before 2.13 may say less


def covered(times: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, reached = 0, -1
    for start, end in sorted(times):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


@contextmanager
def reads(device: torch.device) -> Iterator[list[str]]:
    """Fills with one entry for every time that the host waits for the device in the body."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True, action="always") as caught:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """RuntimeError where the host waits for the device in the body."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
