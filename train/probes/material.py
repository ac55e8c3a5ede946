"""What probes read: passages and windows of held-out text, random tokens, and the pool of a run that repeats text.

All of it is a function of the data set and of the length of a window, and of no seed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thriftlab.data.order import permute
from thriftlab.data.shards import Dataset, Windows
from thriftlab.optim.state.keys import keyed_generator

PASSAGES = 64  # of one length, at most
CANDIDATES = 4096  # among which passages without a border of documents are sought
WINDOWS = 256  # held-out ones, at most
COUNTED = 2**20  # held-out tokens of each source by which tokens are ranked


@dataclass(frozen=True)
class Material:
    """Of windows of `length` predicted tokens; `pool` is None where no text is repeated."""

    dataset: Dataset
    length: int
    pool: Windows | None = None

    @cached_property
    def texts(self) -> list[NDArray[np.integer]]:
        """The held-out tokens of each source."""
        held_out = (self.dataset.windows(source, "validation", self.length) for source in self.dataset.sources)
        return [np.asarray(shard) for windows in held_out for shard in windows.shards]

    @cached_property
    def common(self) -> NDArray[np.int64]:
        """Ids of the tokens in the held-out text, but for the tenth of them that is rarest and the most frequent."""
        size, delimiter = self.dataset.tokenizer.vocab_size, self.dataset.tokenizer.delimiter
        counts = np.zeros(size, np.int64)
        for text in self.texts:
            counts += np.bincount(text[:COUNTED], minlength=size)
        ranked = np.argsort(counts, kind="stable")
        ranked = ranked[ranked != delimiter]
        seen = ranked[counts[ranked] > 0] if counts[ranked].any() else ranked
        tenth = len(seen) // 10
        return seen[tenth : len(seen) - tenth]

    def passages(self, size: int) -> Tensor:
        """Held-out passages within one document, int64 [up to PASSAGES, size]."""
        rows = picked([text[: len(text) // size * size].reshape(-1, size) for text in self.texts], CANDIDATES, size)
        return rows[(rows != self.dataset.tokenizer.delimiter).all(1)][:PASSAGES]

    def windows(self) -> Tensor:
        """Held-out windows as in training, int64 [up to WINDOWS, length + 1]."""
        step = self.length
        whole = (text for text in self.texts if len(text) > step)
        return picked([np.lib.stride_tricks.sliding_window_view(t, step + 1)[::step] for t in whole], WINDOWS, step + 1)

    def random(self, size: int) -> Tensor:
        """Passages of common tokens, drawn with replacement: int64 [PASSAGES, size]."""
        draw = keyed_generator(0, "random passages of probes", size)
        return self.tokens(torch.randint(len(self.common), (PASSAGES, size), generator=draw))

    def distinct(self, rows: int, size: int) -> Tensor:
        """Common tokens, no two of a row alike: int64 [rows, up to size]."""
        draw = keyed_generator(0, "distinct tokens of probes", size)
        orders = [torch.randperm(len(self.common), generator=draw)[:size] for _ in range(rows)]
        return self.tokens(torch.stack(orders))

    def tokens(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self.common)[index]

    def opened(self, rows: Tensor) -> Tensor:
        """Rows behind the token that opens a document: [rows, 1 + size]."""
        return torch.cat([torch.full_like(rows[:, :1], self.dataset.tokenizer.delimiter), rows], 1)

    def pool_rows(self) -> Tensor:
        """The windows of the pool whose loss is measured, int64 [rows, length + 1]; of none if there is no pool."""
        if self.pool is None:
            return torch.empty(0, self.length + 1, dtype=torch.int64)
        return torch.from_numpy(self.pool[np.arange(len(self.pool))].astype(np.int64))


def picked(tables: Iterable[NDArray[np.integer]], most: int, size: int) -> Tensor:
    """Up to `most` of the rows of all tables, in an order that is always the same: int64 [rows, size]."""
    tables = [table for table in tables if len(table)]
    ends = np.cumsum([len(table) for table in tables])
    if not tables:
        return torch.empty(0, size, dtype=torch.int64)
    rows = permute(np.arange(min(most, ends[-1])), int(ends[-1]), 0, 0)
    table = np.searchsorted(ends, rows, side="right")
    found = [tables[t][row - ends[t]] for t, row in zip(table, rows, strict=True)]  # counted back from a table's end
    return torch.from_numpy(np.stack(found).astype(np.int64))
