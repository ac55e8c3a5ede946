"""Batches from a plan: gathered from memory maps, one ahead, without state."""

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from thriftlab.data.mixture import Plan

Item = TypeVar("Item")
Value = TypeVar("Value")


class Batch(NamedTuple):
    """The rows of one step on one rank."""

    tokens: Tensor  # int64 [rows, seq + 1]
    source: Tensor  # int64 [rows], index into plan.sources
    sample: Tensor  # int64 [rows], id of the window among all training windows of the plan


def gather(plan: Plan, step: int, rank: int = 0, world: int = 1) -> Batch:
    """Rows j of step `step` with j % world == rank: the global batch is the same for every world."""
    rows = [column[rank::world] for column in plan.rows(step)]
    return Batch(*map(torch.from_numpy, (plan.read(*rows), rows[0].copy(), plan.samples(*rows))))


def batches(
    plan: Plan, rank: int, world: int, device: torch.device, pack: Callable[[Batch], Any] | None = None
) -> Callable[[int], Any]:
    """`gather` as a function of the step: one batch ahead for a GPU, whose host waits in the meantime, and there in the
    form that `pack` gives it.

    On a CPU there is nobody to read ahead: a thread would take the training's own core and Python's lock from it.
    """
    if device.type == "cpu":
        return functools.partial(gather, plan, rank=rank, world=world)
    return prefetch(plan, rank, world, pack)


def prefetch(
    plan: Plan, rank: int = 0, world: int = 1, pack: Callable[[Batch], Any] | None = None
) -> Callable[[int], Any]:
    """`gather`, then `pack`, as a function of the step that reads the following step's batch in a thread meanwhile.

    Steps may come in any order; an error of the thread is raised by the call that asks for its step.
    """
    reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead: dict[int, Future[Any]] = {}

    def read(step: int) -> Any:
        batch = gather(plan, step, rank, world)
        return batch if pack is None else pack(batch)

    def batch(step: int) -> Any:
        wanted = ahead.pop(step, None) or reader.submit(read, step)
        ahead.clear()
        ahead[step + 1] = reader.submit(read, step + 1)
        return wanted.result()

    return batch


def read_ahead(read: Callable[[Item], Value], items: Iterable[Item], device: torch.device) -> Iterator[Value]:
    """`read` of each item in their order; for a GPU the next one in a thread, while this one is used."""
    if device.type == "cpu":
        yield from map(read, items)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        ahead = None
        for item in items:
            coming = reader.submit(read, item)
            if ahead is not None:
                yield ahead.result()
            ahead = coming
        if ahead is not None:
            yield ahead.result()
