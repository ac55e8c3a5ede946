"""Near duplicates in a corpus: texts that share a bucket of their signatures, and what hangs together through them.

Locality-sensitive hashing as in Lee et al. 2021 (arXiv 2107.06499): documents in one bucket (minhash.py) are taken for
near duplicates, components of the graph for one text, of which the document with the smallest number stays. Two texts
of Jaccard similarity s meet with probability 1 - (1 - s^rows)^bands:

    bands x rows      .5     .6     .7     .8     .9
    20 x 5          .470   .802   .975   1.00   1.00
    22 x 5          .503   .832   .983   1.00   1.00    threshold 0.5
    14 x 8          .053   .211   .565   .924   1.00    FineWeb, the default
    12 x 8          .046   .184   .510   .890   .999    threshold 0.7
     8 x 11         .004   .029   .148   .513   .951    threshold 0.8
     9 x 13         .001   .012   .084   .399   .929
     5 x 19         .000   .000   .006   .070   .516    threshold 0.9
   450 x 20         .000   .016   .302   .995   1.00    RefinedWeb

Nothing depends on how pairs are split or in which order they come. A bucket of k documents makes k - 1 edges, so that
a flood of equal texts costs no more than others. `forest` holds only documents that have a duplicate.
"""

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from thriftlab.data.errors import DataError
from thriftlab.data.prepare.minhash import Banding, buckets_of

DEFAULT, HASHES = "14x8", 112
PAIRS = pa.schema([("part", pa.int32()), ("bucket", pa.uint64()), ("number", pa.int64())])


def banding(bands: str | None = None, threshold: float | None = None) -> Banding:
    """The one written as BANDSxROWS, or else one by which half of the pairs of similarity `threshold` meet."""
    if threshold is None:
        return _written(bands or DEFAULT)
    if bands is not None:
        raise DataError("near.bands and near.threshold say the same in two ways: give one of them")
    if not 0.1 <= threshold <= 0.99:
        raise DataError(f"near.threshold={threshold}: give a similarity from 0.1 to 0.99, as 0.8")
    return _halved_at(threshold)


def chance(similarity: float, banding: Banding) -> float:
    """The probability that two texts of this Jaccard similarity share a bucket."""
    return 1 - (1 - similarity**banding.rows) ** banding.bands


def pairs(texts: Sequence[str], numbers: ArrayLike, parts: int, banding: Banding) -> pa.Table:
    """A row of PAIRS for every bucket of every text; part p of `parts` has the p-th range of buckets."""
    buckets, enough = buckets_of(texts, banding)
    bucket = buckets[enough].ravel()
    number = np.repeat(np.asarray(numbers, np.int64)[enough], banding.bands)
    half = np.uint64(32)
    part = ((bucket >> half) * np.uint64(parts)) >> half
    return pa.table([part.astype(np.int32), bucket, number], schema=PAIRS)


def edges(table: pa.Table) -> NDArray[np.int64]:
    """The forest of what a table of PAIRS connects; all rows of a bucket must be in it."""
    bucket, number = table["bucket"].to_numpy(), table["number"].to_numpy()
    order = np.argsort(bucket)
    bucket, number = bucket[order], number[order]
    opens = np.ones(len(bucket), bool)
    opens[1:] = bucket[1:] != bucket[:-1]
    first = np.flatnonzero(opens)  # [buckets]
    smallest = np.minimum.reduceat(number, first)[np.cumsum(opens) - 1]  # [pairs], of the bucket
    other = number != smallest
    return forest(np.stack([smallest[other], number[other]], axis=1))


def forest(edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """(smallest of the component, other) for every other document that has an edge: int64 [documents, 2], sorted.

    forest(forest(a) + forest(b)) is forest(a + b), where + is concatenation: parts merge in any order and grouping.
    """
    from scipy.sparse import coo_array  # here, because most workers never need it
    from scipy.sparse.csgraph import connected_components

    nodes, ends = np.unique(edges, return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    component = connected_components(graph, directed=False)[1]  # [nodes]
    smallest = np.unique(component, return_index=True)[1][component]  # nodes are sorted, so the first is the smallest
    other = np.flatnonzero(smallest != np.arange(len(nodes)))
    other = other[np.argsort(smallest[other], kind="stable")]
    return np.stack([nodes[smallest[other]], nodes[other]], axis=1)


def stays(forest: NDArray[np.int64], numbers: ArrayLike) -> NDArray[np.int64]:
    """The document that stays for each of `numbers`: itself, or the one it is a near duplicate of: int64 [numbers]."""
    numbers = np.asarray(numbers, np.int64)
    if not len(forest):
        return numbers
    roots, removed = forest[np.argsort(forest[:, 1])].T
    at = np.minimum(np.searchsorted(removed, numbers), len(removed) - 1)
    return np.where(removed[at] == numbers, roots[at], numbers)


def _written(bands: str) -> Banding:
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", bands)
    if match is None:
        raise DataError(f"near.bands={bands}: write BANDSxROWS, as {DEFAULT}")
    return Banding(int(match[1]), int(match[2]))


def _halved_at(threshold: float) -> Banding:
    """The steepest curve, which is that of most rows, that HASHES can bring to 1/2 at the threshold."""
    full = (Banding(HASHES // rows, rows) for rows in range(1, HASHES + 1))
    rows = max(each.rows for each in full if chance(threshold, each) >= 0.5)
    bands = (Banding(bands, rows) for bands in range(1, HASHES // rows + 1))
    return min(bands, key=lambda each: abs(chance(threshold, each) - 0.5))
