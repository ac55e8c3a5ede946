"""Rank and select over a set of the numbers below n that is a function and not stored: eight bytes for 65,536 numbers,
counted once when they are asked for first."""

import functools
from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
CHUNK = 2**16


class Ranks:
    """`member` says of numbers whether they belong to the set."""

    def __init__(self, n: int, member: Callable[[Array], NDArray[np.bool_]]):
        self.n, self.member = n, member
        self.chunk = functools.lru_cache(maxsize=4)(self.members)

    def members(self, chunk: int) -> Array:
        """Those in chunk number `chunk`, ascending."""
        numbers = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, self.n))
        return numbers[self.member(numbers)]

    @cached_property
    def counts(self) -> Array:
        """Members before each chunk, then of all: [chunks + 1]."""
        return np.cumsum([0, *(len(self.members(c)) for c in range(-(-self.n // CHUNK)))], dtype=np.int64)

    def rank(self, numbers: Array) -> Array:
        """Members below each of the numbers."""
        found, chunks = np.empty(numbers.shape, np.int64), numbers // CHUNK
        for c in np.unique(chunks):
            here = chunks == c
            found[here] = self.counts[c] + np.searchsorted(self.chunk(int(c)), numbers[here])
        return found

    def before(self, number: int) -> int:
        """The same for one, which may be n."""
        return int(self.counts[-1]) if number >= self.n else int(self.rank(np.array([number]))[0])

    def select(self, ranks: Array) -> Array:
        """The members of these ranks: the inverse."""
        found = np.empty(ranks.shape, np.int64)
        chunks = np.searchsorted(self.counts, ranks, side="right") - 1
        for c in np.unique(chunks):
            here = chunks == c
            found[here] = self.chunk(int(c))[ranks[here] - self.counts[c]]
        return found
