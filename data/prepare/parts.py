"""One part of the distinct documents after another: what tasks read, and what they leave, row by row.

A part has the documents of all sources in one range of keys, sorted by (source, key). The number of a document is its
rank in the order (source, key) of all parts: everything after `clean.unique` speaks of numbers. Tasks leave arrays with
one row for every document of the part.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thriftlab.data.prepare.work import Work, read_array, read_table

ROWS = 4096  # documents whose texts are held as Python strings at once

TRAIN, HELD, NEAR, LEAKS = np.int8(0), np.int8(1), np.int8(2), np.int8(3)  # what becomes of a document


@dataclass(frozen=True)
class Parts:
    """The unfinished folder and how its documents are numbered: `starts` int64 [sources, parts + 1]."""

    work: Work
    starts: NDArray[np.int64]

    @property
    def count(self) -> int:
        return self.starts.shape[1] - 1

    def rows(self, part: int) -> NDArray[np.int64]:
        """Where the rows of each source begin in the file of a part, and where the last ends: [sources + 1]."""
        return np.cumsum([0, *(self.starts[:, part + 1] - self.starts[:, part])])

    def numbers(self, part: int) -> NDArray[np.int64]:
        """Of the documents of a part: int64 [rows]."""
        return np.concatenate([np.arange(*each) for each in self.starts[:, part : part + 2]])

    def table(self, part: int) -> pa.Table:
        return read_table(self.work.path(f"unique/{part:05}.arrow"))

    def array(self, name: str, part: int) -> np.ndarray:
        return read_array(self.work.path(f"{name}/{part:05}.npy"))

    def duplicates(self, part: int) -> NDArray[np.int64]:
        """The number of the document that each one is a near duplicate of, or its own: int64 [rows]."""
        return self.array("duplicates", part) if self.work.is_finished("duplicates") else self.numbers(part)


def number(work: Work, sources: int, parts: int) -> Parts:
    """The parts as `clean.unique` left them."""
    rows = np.zeros((sources, parts + 1), np.int64)
    for part, facts in enumerate(work.all_facts("unique", parts)):
        rows[:, part + 1] = facts["rows"]
    flat = np.cumsum(rows)  # source after source
    return Parts(work, flat.reshape(rows.shape))


def texts(table: pa.Table, chosen: NDArray[np.bool_] | None = None) -> Iterator[tuple[slice, list[str]]]:
    """The texts of a table, ROWS at a time: (which of the chosen rows they are, texts)."""
    column = table["text"] if chosen is None else table["text"].filter(pa.array(chosen))
    for start in range(0, len(column), ROWS):
        held = column.slice(start, ROWS).to_pylist()
        yield slice(start, start + len(held)), held
