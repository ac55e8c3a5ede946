"""The highest memory of each phase of a run on a GPU: bytes that torch has allocated there for this process.

Phases are build, witness, step, evaluation and checkpoint. The peak is reset whenever the phase changes, so none of
them has what another one took; what was allocated before, weights and state above all, counts in each.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

REHEARSAL = "witness"  # the phase that is no part of training


class Peaks:
    """Of one process; on a CPU, whose memory is not the run's alone, there are none."""

    def __init__(self, device: torch.device):
        self.device, self.phase = device, "build"
        self.highest: dict[str, int] = {}
        if device.type != "cpu":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)

    def enter(self, phase: str) -> None:
        """From here on it is this phase."""
        if self.device.type != "cpu":
            self.note()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.phase = phase

    def note(self) -> None:
        now = torch.cuda.max_memory_allocated(self.device)
        self.highest[self.phase] = max(now, self.highest.get(self.phase, 0))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def told(self) -> dict[str, int] | None:
        """By phase, so far; None on a CPU."""
        if self.device.type == "cpu":
            return None
        self.note()
        return dict(self.highest)
