"""How often each integer occurs: counts that add up over parts, in any order and grouping, to those of the whole."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Tally(NamedTuple):
    values: NDArray[np.int64]  # [distinct], ascending
    counts: NDArray[np.int64]  # [distinct]


def tally(values: ArrayLike) -> Tally:
    return Tally(*np.unique(np.asarray(values, np.int64), return_counts=True))


def add(tallies: Iterable[Tally]) -> Tally:
    parts = [Tally(np.empty(0, np.int64), np.empty(0, np.int64)), *tallies]
    values, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    return Tally(distinct, np.add.reduceat(counts[order], starts) if len(starts) else counts)


def look_up(keys: NDArray[np.int64], table: NDArray[np.int64], *values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """What lies beside each key in an ascending table, 0 where it is not there, [keys] each; fast where keys ascend."""
    if not len(table):
        return [np.zeros(len(keys), np.int64) for _ in values]
    rows = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    there = table[rows] == keys
    return [np.where(there, each[rows], 0) for each in values]
