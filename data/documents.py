"""The documents of a source in any order, packed one after the other as if they were a shard, without a copy of tokens.

A shard says where its documents end; here they are numbered over all shards of the source.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.chosen import ChosenTokens

Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Shards:
    """Shards as one array of which pieces are read that lie within one shard."""

    shards: list[NDArray[Any]]
    starts: Array  # [shards + 1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.shards[0].dtype if self.shards else np.dtype(np.uint16)

    def __getitem__(self, piece: slice) -> NDArray[Any]:
        k = int(np.searchsorted(self.starts, piece.start, side="right")) - 1
        first = int(self.starts[k])
        return self.shards[k][piece.start - first : piece.stop - first]


@dataclass(frozen=True, eq=False)
class Documents:
    """`d[i]`: the tokens of document i. `starts` and `lengths` are in tokens of `tokens`: [documents]."""

    tokens: Shards
    starts: Array
    lengths: Array
    fingerprint: str

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> NDArray[Any]:
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def packed(self, order: Array) -> ChosenTokens:
        """One after the other in this order, in which a document may be more than once."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths[order])])
        return ChosenTokens(self.tokens, bounds, self.starts[order] - bounds[:-1])


def join(parts: list[Documents], fingerprint: str) -> Documents:
    """The documents of several sources as those of one."""
    shards = [shard for part in parts for shard in part.tokens.shards]
    offsets = np.cumsum([0, *(int(part.tokens.starts[-1]) for part in parts)])
    return Documents(
        Shards(shards, edges(shards)),
        np.concatenate([part.starts + offset for part, offset in zip(parts, offsets, strict=False)]),
        np.concatenate([part.lengths for part in parts]),
        fingerprint,
    )


def documents(
    shards: list[NDArray[Any]], ends: list[Array], masks: list[NDArray[np.bool_]] | None, fingerprint: str
) -> Documents:
    """Those of all shards, or those that the masks choose: [documents of the shard] each."""
    begin = edges(shards)
    chosen = masks or [np.ones(len(end), bool) for end in ends]
    starts = [np.concatenate([[0], end[:-1]]) + first for end, first in zip(ends, begin, strict=False)]
    lengths = [np.diff(end, prepend=0) for end in ends]
    return Documents(Shards(shards, begin), those(starts, chosen), those(lengths, chosen), fingerprint)


def those(columns: list[Array], masks: list[NDArray[np.bool_]]) -> Array:
    return np.concatenate([column[mask] for column, mask in zip(columns, masks, strict=True)]).astype(np.int64)


def edges(shards: list[NDArray[Any]]) -> Array:
    return np.cumsum([0, *map(len, shards)], dtype=np.int64)
