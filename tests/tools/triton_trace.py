"""What launches in triton's interpreter would move to and from the memory of a GPU, in bytes; masks are counted.

    with trace() as moved:
        launcher(...)
    moved.distinct, moved.asked

`distinct`: sectors of 32 bytes that were loaded, and that were stored, each counted once: what memory must deliver if
nothing has to be fetched again. `asked`: sectors by instruction, each program's load or store for itself: what is asked
of the caches. Neither is a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

from tests.tools.triton_guard import addresses_of

SECTOR = 32


class Moved:
    def __init__(self):
        self.asked, self.programs = 0, 0
        self.sectors = {"load": [], "store": []}

    def touch(self, kind, pointers, mask):
        sectors = np.unique(addresses_of(pointers, mask) // SECTOR)
        self.asked += SECTOR * sectors.size
        self.sectors[kind].append(sectors)

    @property
    def distinct(self):
        return sum(SECTOR * np.unique(np.concatenate(found)).size for found in self.sectors.values() if found)


@contextmanager
def trace() -> Iterator[Moved]:
    moved = Moved()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    turn = InterpreterBuilder.set_grid_idx

    def traced_load(self, pointers, mask, *rest):
        moved.touch("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def traced_store(self, pointers, value, mask, *rest):
        moved.touch("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def traced_turn(self, *place):
        moved.programs += 1
        return turn(self, *place)

    traced = {"create_masked_load": traced_load, "create_masked_store": traced_store, "set_grid_idx": traced_turn}
    with patch.multiple(InterpreterBuilder, **traced):
        yield moved
