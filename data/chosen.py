"""The chosen documents of a shard, one after the other as if they were a shard of their own, without a copy of tokens.

Chosen neighbours make a run, which is a piece of the shard. A row of tokens is one piece of a run, or several.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**22  # tokens


class Pieces(Protocol):
    """What a shard is asked for."""

    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, piece: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class ChosenTokens:
    """`len` and `dtype` are those of the chosen tokens; the token at x of run k is at x + shift[k] of the shard."""

    shard: Pieces
    bounds: NDArray[np.int64]  # where the runs begin among the chosen tokens, then the number of all: [runs + 1]
    shift: NDArray[np.int64]  # [runs]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.shard.dtype

    def pieces(self) -> Iterator[NDArray[Any]]:
        """All of them in order, up to CHUNK at a time."""
        for (start, end), shift in zip(pairwise(self.bounds.tolist()), self.shift.tolist(), strict=True):
            for first in range(start, end, CHUNK):
                yield self.shard[first + shift : min(first + CHUNK, end) + shift]


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """Overlapping rows of chosen tokens: row s is tokens[s * step : s * step + step + 1]."""

    tokens: ChosenTokens
    step: int

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        bounds, shift = self.tokens.bounds, self.tokens.shift
        first, end = rows * self.step, rows * self.step + self.step + 1
        run = np.searchsorted(bounds, first, side="right") - 1
        count = np.searchsorted(bounds, end, side="left") - run  # of runs that a row meets: [rows]
        row = np.repeat(np.arange(len(rows)), count)  # of each piece: [pieces]
        run = np.arange(len(row)) + np.repeat(run - np.cumsum(count) + count, count)
        start, stop = np.maximum(bounds[run], first[row]), np.minimum(bounds[run + 1], end[row])
        columns = (
            (start + shift[run]).tolist(), (stop + shift[run]).tolist(),
            row.tolist(), (start - first[row]).tolist(), (stop - first[row]).tolist(),
        )  # fmt: skip
        out = np.empty((len(rows), self.step + 1), self.tokens.dtype)
        for a, b, i, left, right in zip(*columns, strict=True):
            out[i, left:right] = self.tokens.shard[a:b]
        return out


def choose(shard: NDArray[Any], ends: NDArray[np.int64], chosen: NDArray[np.bool_]) -> ChosenTokens:
    """The documents of a shard that are chosen: [documents], as are the places where they end."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    starts = np.concatenate([[0], ends])
    first, last = starts[edges[::2]], starts[edges[1::2]]  # of each run: [runs]
    bounds = np.concatenate([[0], np.cumsum(last - first)])
    return ChosenTokens(shard, bounds, first - bounds[:-1])
