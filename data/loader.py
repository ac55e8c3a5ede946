"""Batches from a plan: gathered from memory maps, one ahead, without state."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from thriftlab.data.mixture import Plan


class Batch(NamedTuple):
    """The rows of one step on one rank."""

    tokens: Tensor  # int64 [rows, seq + 1]
    source: Tensor  # int64 [rows], index into plan.sources
    sample: Tensor  # int64 [rows], id of the window among all training windows of the plan


def gather(plan: Plan, step: int, rank: int = 0, world: int = 1) -> Batch:
    """Rows j of step `step` with j % world == rank: the global batch is the same for every world."""
    rows = [column[rank::world] for column in plan.rows(step)]
    return Batch(*map(torch.from_numpy, (plan.read(*rows), rows[0].copy(), plan.samples(*rows))))


def batches(plan: Plan, rank: int, world: int, device: torch.device) -> Callable[[int], Batch]:
    """`gather` as a function of the step: one batch ahead for a GPU, whose host waits in the meantime.

    On a CPU there is nobody to read ahead: a thread would take the training's own core and Python's lock from it.
    """
    return (
        functools.partial(gather, plan, rank=rank, world=world) if device.type == "cpu" else prefetch(plan, rank, world)
    )


def prefetch(plan: Plan, rank: int = 0, world: int = 1) -> Callable[[int], Batch]:
    """`gather` as a function of the step that reads the following step's batch in a thread meanwhile.

    Steps may come in any order; an error of the thread is raised by the call that asks for its step.
    """
    reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead: dict[int, Future[Batch]] = {}

    def batch(step: int) -> Batch:
        wanted = ahead.pop(step, None) or reader.submit(gather, plan, step, rank, world)
        ahead.clear()
        ahead[step + 1] = reader.submit(gather, plan, step + 1, rank, world)
        return wanted.result()

    return batch
