"""What launches in triton's interpreter would move to and from the memory of a GPU, in bytes; masks are counted.

    with trace() as moved:
        launcher(...)
    moved.distinct, moved.asked

`distinct`: sectors of 32 bytes that were loaded, and that were stored, each counted once: what memory must deliver if
nothing has to be fetched again. `asked`: sectors by instruction, each program's load or store for itself: what is asked
of the caches. Neither is a time. Look-ups in small tables, which stay in the cache of the program, are not `asked`: the
tables are named, `trace(table)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

from tests.tools.triton_guard import addresses_of, reach

SECTOR = 32


class Moved:
    def __init__(self, tables):
        self.asked, self.programs = 0, 0
        self.sectors = {"load": [], "store": []}
        self.tables = [reach(table) for table in tables]

    def touch(self, kind, pointers, mask):
        addresses = addresses_of(pointers, mask)
        sectors = np.unique(addresses // SECTOR)
        self.sectors[kind].append(sectors)
        if not any(addresses.size and start <= addresses[0] < stop for start, stop in self.tables):
            self.asked += SECTOR * sectors.size

    @property
    def distinct(self):
        return sum(SECTOR * np.unique(np.concatenate(found)).size for found in self.sectors.values() if found)


@contextmanager
def trace(*tables) -> Iterator[Moved]:
    moved = Moved(tables)
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
