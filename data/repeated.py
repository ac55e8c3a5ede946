"""The plan of a run whose data are repeated under control: rows of the pool are a source of their own, `repeated`.

Windows are those of the other sources, so the pool has no text of its own: its row names the window by the id that it
has among all. With documents, windows are cut from copies in a row, and belong to the pool by the half of their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.chosen import ChosenRows
from thriftlab.data.documents import Documents, join
from thriftlab.data.errors import DataError
from thriftlab.data.mixture import REPEATED, Array, Plan, Source, aligned, digest, plan
from thriftlab.data.repetition import ControlledRepetition
from thriftlab.data.shards import Dataset, Windows

POOL_ROWS = 64  # whose loss is measured
PIECE = 2**16  # rows counted at a time


class Corpus:
    """All windows of a plan by their ids, as the source of a repetition."""

    def __init__(self, base: Plan):
        self.base, self.sequence_length, self.fingerprint = base, base.sequence_length, base.fingerprint

    def __len__(self) -> int:
        return sum(self.base.cycle.windows)

    def __getitem__(self, index: int) -> Array:
        source, window = self.base.located(np.array([index]))
        return self.base.read(source, window, window)[0]


class Pool(Windows):
    """Rows of the pool, each a shard of one window."""

    def tail(self) -> None:
        return None


@dataclass(frozen=True, eq=False)
class RepeatedPlan(Plan):
    """Rows of windows that are repeated as they are."""

    repetition: ControlledRepetition

    def at(self, start: int, count: int) -> tuple[Array, Array, Array]:
        """As in a mixture; nothing comes after the end of the run."""
        ids, repeat = self.repetition.at(np.arange(start, min(start + count, self.length)))
        source, window = self.located(ids)
        pool = len(self.windows)
        return np.where(repeat, pool, source), np.where(repeat, ids, window), np.zeros_like(ids)

    @property
    def length(self) -> int:
        """Rows of the run."""
        return len(self.repetition)

    @cached_property
    def first(self) -> Array:
        """The id of the first window of each source that has windows of its own."""
        return np.cumsum([0, *self.cycle.windows[:-1]], dtype=np.int64)

    @cached_property
    def offsets(self) -> Array:
        """The pool's rows have the ids of the windows that they are."""
        return np.concatenate([self.first, np.zeros(len(self.sources) - len(self.first), np.int64)])

    def located(self, sample: Array) -> tuple[Array, Array]:
        source = np.searchsorted(self.first, sample, side="right") - 1
        return source, sample - self.first[source]

    def read(self, source: Array, window: Array, epoch: Array) -> Array:
        return super().read(*self.located(self.samples(source, window, epoch)), epoch)

    def drawn(self, rows: int) -> Array:
        count = np.zeros(len(self.sources), np.int64)
        for start in range(0, rows, PIECE):
            count += np.bincount(self.at(start, min(PIECE, rows - start))[0], minlength=len(self.sources))
        return count

    @property
    def unique(self) -> list[int]:
        """Those of the pool count again beside those of its sources."""
        if self.repetition.control:
            return super().unique
        amounts = self.repetition.amounts
        return [*super().unique, amounts.tokens[0] if amounts.tokens else amounts.pool_size * self.sequence_length]

    def fitting(self, steps: int) -> int:
        """The control without repeats is shorter by them."""
        if self.length < self.batch_size:
            raise DataError(
                f"data.repetition: without the repeats {self.length} windows are left, less than a step of "
                f"{self.batch_size}; lengthen the run"
            )
        return min(steps, self.length // self.batch_size)

    @cached_property
    def pool(self) -> Windows | None:
        """The first rows of the pool, to measure its loss; None in a control, which has none."""
        if self.repetition.control:
            return None
        return self.windows_of(self.pool_rows())

    def pool_rows(self) -> NDArray[Any]:
        ids = self.repetition.ids(np.arange(min(POOL_ROWS, self.repetition.amounts.pool_size)))
        return super().read(*self.located(ids), ids)

    def windows_of(self, rows: NDArray[Any]) -> Windows:
        return Pool(list(rows), self.sequence_length, rows.size, len(rows), 0)

    def announcement(self) -> str:
        return self.table()

    def table(self, steps: int | None = None) -> str:
        """What is repeated and what is not, of the whole run."""
        told, amounts, length = self.repetition.plan(), self.repetition.amounts, self.sequence_length
        unit = "windows" if told["unit"] == "sequence" else "documents"
        repeats, once = amounts.counts
        repeated, whole = amounts.tokens[1:] if amounts.tokens else (repeats * length, (repeats + once) * length)
        lines = [["repetition", unit, "share", "items", "exposures", "tokens"]]
        if told["control"]:
            repeated = 0
        else:
            seen = f"{repeats / amounts.pool_size:.6g}"
            pool = f"{repeats:,}", f"{repeated / whole:.2%}", f"{amounts.pool_size:,}", seen, f"{repeated:,}"
            lines.append([REPEATED, *pool])
        lines.append(["once", f"{once:,}", f"{1 - repeated / whole:.2%}", f"{once:,}", "1", f"{whole - repeated:,}"])
        said = [
            f"fraction {told['fraction']:g} asked, {told['realised_fraction']:.6g} realised",
            f"control {told['control'] or 'none'}, spacing {told['spacing']}, pool seed {told['pool_seed']}",
        ]
        if (left := told["left_over"]) and not told["control"]:
            said.append(f"{amounts.asked:,} {unit} are no multiple of {told['repeats']}: {left} are seen once instead")
        return "\n".join([aligned(lines), *said])


@dataclass(frozen=True, eq=False)
class PackedPlan(RepeatedPlan):
    """Rows cut from documents that are repeated as they are, one after the other."""

    documents: Documents
    source_of: Array  # [documents]

    @cached_property
    def order(self) -> tuple[Array, NDArray[np.bool_]]:
        """The documents of the run, and which of them are repeats: [exposures] each."""
        return self.repetition.at(np.arange(len(self.repetition)))

    @cached_property
    def packed(self) -> ChosenRows:
        return ChosenRows(self.documents.packed(self.order[0]), self.sequence_length)

    @property
    def length(self) -> int:
        return (len(self.packed.tokens) - 1) // self.sequence_length

    @property
    def fixed(self) -> bool:
        return False

    @cached_property
    def offsets(self) -> Array:
        return np.zeros(len(self.sources), np.int64)

    def at(self, start: int, count: int) -> tuple[Array, Array, Array]:
        row = np.arange(start, min(start + count, self.length))
        ids, repeat = self.order
        first = row * self.sequence_length
        opens = np.searchsorted(self.packed.tokens.bounds, first, side="right") - 1
        copied = self.copied(first + self.sequence_length + 1) - self.copied(first + 1)  # of the predicted tokens
        pool = 2 * copied > self.sequence_length
        return np.where(pool, len(self.windows), self.source_of[ids[opens]]), row, np.zeros_like(row)

    def copied(self, tokens: Array) -> Array:
        """How many of the first tokens of the run are those of repeats."""
        bounds, repeat = self.packed.tokens.bounds, self.order[1]
        whole = np.concatenate([[0], np.cumsum(np.diff(bounds) * repeat)])
        inside = np.searchsorted(bounds, tokens, side="left") - 1
        return whole[inside] + (tokens - bounds[inside]) * repeat[inside]

    def read(self, source: Array, window: Array, epoch: Array) -> Array:
        return self.packed[window].astype(np.int64)

    def pool_rows(self) -> NDArray[Any]:
        wanted = self.repetition.ids(np.arange(self.repetition.amounts.pool_size))
        rows = ChosenRows(self.documents.packed(wanted), self.sequence_length)
        return rows[np.arange(min(POOL_ROWS, (len(rows.tokens) - 1) // self.sequence_length))]


def repeated_plan(
    dataset: Dataset,
    sequence_length: int,
    batch_size: int,
    seed: int,
    sources: Sequence[Source] | None,
    steps: int | None,
    **options: Any,
) -> RepeatedPlan:
    """Plan a run of so many steps, part of which is repeated; `options` are those of `ControlledRepetition`."""
    if steps is None:
        raise DataError("data.repetition needs a run of known length: set the budget in tokens or FLOPs")
    chosen = list(sources or map(Source, dataset.sources))
    if len(chosen) > 1 and any(source.weight or source.epochs for source in chosen):
        raise DataError(
            "data.repetition draws from all windows alike and takes no weights or epochs of several sources; choose "
            "one source, or leave them out"
        )
    if REPEATED in dataset.sources:
        raise DataError(f"{dataset.path}: source {REPEATED!r} has the name of the pool; prepare it under another name")
    chosen = [Source(source.name, where=source.where) for source in chosen]
    base = plan(dataset, sequence_length, batch_size, seed, chosen)
    options |= {"seed": seed, "batch_size": batch_size}
    sources = chosen if options["control"] else [*chosen, Source(REPEATED)]
    rows = steps * batch_size
    parts = sources, base.windows, sequence_length, batch_size, base.cycle
    if options["unit"] == "sequence":
        made = ControlledRepetition(Corpus(base), rows, **options)
        return RepeatedPlan(*parts, digest([base.fingerprint, made.config_hash]), made)
    each = [dataset.documents(source.name, source.where) for source in chosen]
    texts = join(each, base.fingerprint)
    made = ControlledRepetition(texts, total_tokens=rows * sequence_length + 1, **options)
    of = np.repeat(np.arange(len(each)), [len(some) for some in each])
    return PackedPlan(*parts, digest([base.fingerprint, made.config_hash]), made, texts, of)
