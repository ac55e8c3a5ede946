"""What a check is given and what it gives: data in, data out.

A check is a generator of findings, each of which takes the place of the one before: it yields what it knows whenever
it knows more, so that one that runs out of time leaves what it had.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
TINY: dict[str, Any] = {"preset": None, "dim": 32, "layers": 1, "heads": 4, "hidden": 48, "tied": True}  # of rehearsals


@dataclass(frozen=True)
class Setting:
    """Where a check computes, and how large."""

    device: torch.device
    small: bool  # sizes for a rehearsal, whose numbers mean nothing
    text: Path  # a prepared data set
    folder: Path  # for this check to write in

    def size(self, whole: T, small: T) -> T:
        return small if self.small else whole

    def model(self, sizes: dict[str, Any]) -> dict[str, Any]:
        """A model of these sizes, or the smallest."""
        return TINY if self.small else sizes

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    says: str  # a cell of the table
    numbers: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # what is not as it should be


class Skipped(Exception):
    """A check that cannot be made here; the message says why."""


class NotBuilt(Skipped):
    """A check of a part that this version does not have."""


Body = Callable[[Setting], Iterator[Finding]]
