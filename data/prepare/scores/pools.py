"""Pools of one quality: cuts at the quantiles of a score, found from counts that add up over parts.

A score is an integer, so its counts by value are exact, and so are the quantiles: no sketch, whose answer depends on
the order of merging. `tally` counts the scores of a part; the counts of a source, or of all, are the `add` of them.
"""

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.errors import DataError
from thriftlab.data.prepare.scores.tally import Tally


def cuts(scores: Tally, pools: int) -> NDArray[np.int64]:
    """Where pools of equal size end, [pools - 1]: the k-th is the smallest score that k/pools of all are not above."""
    if not len(scores.values):
        raise DataError("pools: no document has a score; add a source with documents that stay")
    below = np.cumsum(scores.counts)
    wanted = below[-1] * np.arange(1, pools)
    return scores.values[np.searchsorted(below * pools, wanted)]


def pool_of(scores: NDArray[np.int32], ends: NDArray[np.int64]) -> NDArray[np.int32]:
    """The pool of each document, 0 the lowest, [documents]. Equal scores are in one pool, the lower one."""
    return np.searchsorted(ends, scores).astype(np.int32)
