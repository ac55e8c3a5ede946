"""Windows that are cut anew in each epoch, from the documents of a source in an order of that epoch's own.

Fixed windows show a document with the same neighbours, and cut at the same places, in every epoch.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.chosen import ChosenRows
from thriftlab.data.documents import Documents
from thriftlab.data.order import permute

Array = NDArray[np.int64]


class Reshuffled:
    """Of one source: window w of epoch e is tokens w * T ... w * T + T of its documents in the order of (seed, e).

    `len` is the number of windows of an epoch; the tokens after the last one, T at most, are others in each epoch.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int):
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        self.tokens = int(documents.lengths.sum())
        self.epoch = functools.lru_cache(maxsize=2)(self.pack)

    def __len__(self) -> int:
        return max(0, self.tokens - 1) // self.sequence_length

    def pack(self, epoch: int) -> ChosenRows:
        n = len(self.documents)
        order = permute(np.arange(n), n, self.seed, epoch)
        return ChosenRows(self.documents.packed(order), self.sequence_length)

    def gather(self, rows: Array, epochs: Array, out: NDArray[Any], where: Array) -> None:
        """Write window rows[i] of epoch epochs[i] to out[where[i]]."""
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[where[here]] = self.epoch(int(epoch))[rows[here]]
