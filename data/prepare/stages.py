"""What is done to the distinct documents, part by part: near duplicates, held-out text, decontamination.

Every function takes the number of a part, reads what earlier ones left, writes files of its own, and is finished when
its facts are there; none knows how many others run beside it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thriftlab.data.prepare.dedup import HeldOut
from thriftlab.data.prepare.minhash import Banding
from thriftlab.data.prepare.near import PAIRS, edges, forest, pairs
from thriftlab.data.prepare.parts import HELD, LEAKS, NEAR, TRAIN, Parts, texts
from thriftlab.data.prepare.work import write_array

MOST = 0.2  # of a source, that a minimum of bytes may hold out

# --- near duplicates -------------------------------------------------------------------------------------------------


def near_pairs(parts: Parts, banding: Banding, part: int) -> pa.Table:
    table, numbers = parts.table(part), parts.numbers(part)
    found = [pairs(held, numbers[rows], parts.count, banding) for rows, held in texts(table)]
    return pa.concat_tables([*found, PAIRS.empty_table()])


def near_edges(parts: Parts, part: int, table: pa.Table) -> None:
    write_array(parts.work.folder("near") / f"{part:05}.npy", edges(table))
    parts.work.finish(f"near/{part:05}", {})


def merge_near(parts: Parts) -> None:
    """Of all parts: what is held is documents that have a near duplicate, not all."""
    found = np.empty((0, 2), np.int64)
    for part in range(parts.count):
        found = forest(np.concatenate([found, parts.array("near", part)]))
    stayed, removed = found[np.argsort(found[:, 1])].T
    folder = parts.work.folder("duplicates")
    for part in range(parts.count):
        numbers, rows = parts.numbers(part), parts.rows(part)
        for start, (first, last) in zip(rows, parts.starts[:, part : part + 2], strict=False):
            a, b = np.searchsorted(removed, [first, last])
            numbers[start + removed[a:b] - first] = stayed[a:b]
        write_array(folder / f"{part:05}.npy", numbers)
    parts.work.finish("duplicates", {"removed": len(removed)})


# --- holding out -----------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """Some documents of a source, and those that are next in line to be held out: [point, bytes] each, by point."""

    documents: int
    bytes: int
    first: list[list[int]]


def lines(parts: Parts, minimum: int, part: int) -> list[Line]:
    """Of each source, the documents of a part that are left."""
    table = parts.table(part)
    points, sizes = table["point"].to_numpy(), table["bytes"].to_numpy()
    left = parts.duplicates(part) == parts.numbers(part)
    rows = parts.rows(part)
    return [
        line(points[a:b][left[a:b]], sizes[a:b][left[a:b]], minimum) for a, b in zip(rows[:-1], rows[1:], strict=True)
    ]


def line(points: NDArray[np.uint64], sizes: NDArray[np.int32], minimum: int) -> Line:
    """As far as it can matter: until `minimum` bytes are reached, as if these were all documents of the source."""
    order = np.argsort(points)
    enough = np.searchsorted(np.cumsum(sizes[order], dtype=np.int64), minimum) + 1
    first = order[:enough]
    rows = zip(points[first].tolist(), sizes[first].tolist(), strict=True)
    return Line(len(points), int(sizes.sum(dtype=np.int64)), [list(row) for row in rows])


def cut_held_out(found: Sequence[Line], minimum: int) -> int:
    """The largest point that is held out for the sake of `minimum` bytes, given all parts of one source.

    The minimum stops at a fifth of the source; one document is always held out.
    """
    first = sorted(row for each in found for row in each.first)
    if not first:
        return 0
    held = np.cumsum([size for _, size in first])  # bytes of each document and of those before it
    enough = int(np.searchsorted(held, minimum)) + 1
    most = int(np.searchsorted(held, MOST * sum(each.bytes for each in found), "right"))
    return first[max(1, min(enough, most)) - 1][0]


def is_held(points: NDArray[np.uint64], share: float, last: int) -> NDArray[np.bool_]:
    return (points.astype(np.float64) / 2**64 < share) | (points <= np.uint64(last))


# --- decontamination -------------------------------------------------------------------------------------------------


def index_held_out(parts: Parts, share: float, cuts: list[int]) -> list[int]:
    """Leaves the index of all held-out documents; returns how many each source has."""
    counts = np.zeros(len(cuts), np.int64)

    def held() -> Iterator[str]:
        for part in range(parts.count):
            table, chosen = parts.table(part), _held(parts, share, cuts, part)
            rows = parts.rows(part)
            counts[:] += [int(chosen[a:b].sum()) for a, b in zip(rows[:-1], rows[1:], strict=True)]
            for _, found in texts(table, chosen):
                yield from found

    HeldOut.of(held()).save(parts.work.folder("held"))
    return counts.tolist()


def _held(parts: Parts, share: float, cuts: list[int], part: int) -> NDArray[np.bool_]:
    points, rows = parts.table(part)["point"].to_numpy(), parts.rows(part)
    held = [is_held(points[a:b], share, last) for a, b, last in zip(rows[:-1], rows[1:], cuts, strict=True)]
    return np.concatenate(held) & (parts.duplicates(part) == parts.numbers(part))


def decontaminate(parts: Parts, share: float, cuts: list[int], threshold: float, part: int) -> None:
    """Leaves what becomes of each document (TRAIN, HELD, NEAR, LEAKS), and its overlap with held-out text."""
    table, held = parts.table(part), _held(parts, share, cuts, part)
    removed = parts.duplicates(part) != parts.numbers(part)
    overlap = np.full(len(table), np.nan, np.float32)
    candidates = np.flatnonzero(~held & ~removed)
    index = HeldOut.load(parts.work.path("held"))
    leaks = np.zeros(len(table), bool)
    for rows, found in texts(table, ~held & ~removed):
        shares = np.array([index.overlap(text) for text in found])
        overlap[candidates[rows]] = shares
        leaks[candidates[rows]] = shares >= threshold
    fate = np.select([removed, held, leaks], [NEAR, HELD, LEAKS], TRAIN).astype(np.int8)
    write_array(parts.work.folder("overlap") / f"{part:05}.npy", overlap)
    write_array(parts.work.folder("fate") / f"{part:05}.npy", fate)
    sizes, bounds = table["bytes"].to_numpy(), parts.rows(part)
    parts.work.finish(f"fate/{part:05}", {
        "fates": [
            [[int((fate[a:b] == what).sum()), int(sizes[a:b][fate[a:b] == what].sum())] for what in range(4)]
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ],
    })  # fmt: skip


def fates(parts: Parts) -> NDArray[np.int64]:
    """Documents and bytes by source and what became of them: int64 [sources, 4, 2]."""
    return np.sum([facts["fates"] for facts in parts.work.all_facts("fate", parts.count)], axis=0, dtype=np.int64)


def training_texts(parts: Parts) -> Iterator[str]:
    """All texts that are trained on, source by source as `starts` has them, for a tokenizer."""
    for part in range(parts.count):
        for _, found in texts(parts.table(part), np.asarray(parts.array("fate", part)) == TRAIN):
            yield from found
