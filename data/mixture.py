"""Mixtures as a function: which window of which source is row g of the run, computed at a point.

A mixture is a cycle with `counts[p]` rows of each source p, dealt into blocks of about 1024 slots so evenly that each
block holds floor or ceil of every source's share: line up the cycle's rows source by source, and let block b of B take
the positions x = b (mod B). Slots of a block are in the order of the keyed permutation, and each source runs through
its own windows in its own keyed order. Nothing is stored: (R // B) * b + min(R % B, b) positions below R lie in the
blocks before b. The surprise: one source alone needs no special case, it is the plain stream.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.errors import DataError
from thriftlab.data.order import permute, stream
from thriftlab.data.proxy import kept_windows
from thriftlab.data.quotas import BLOCK, Source, cycle_counts
from thriftlab.data.reshuffle import Reshuffled
from thriftlab.data.shards import Dataset, Windows

REPEATED = "repeated"  # the source of rows that are of a repeated pool

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Cycle:
    """Rows per source of one cycle, windows per source, and the keys: all that decides the order."""

    counts: tuple[int, ...]
    windows: tuple[int, ...]
    seeds: tuple[int, ...]
    seed: int
    kept: tuple[int, ...] | None = None  # windows per source that a proxy reads; None: all

    @property
    def read(self) -> tuple[int, ...]:
        """Windows of each source that are passed over."""
        return self.kept or self.windows

    def draws(self, p: int, start: int, count: int) -> tuple[Array, Array]:
        """(epoch, window) of the rows start, ..., start + count - 1 of source p, int64 [count] each."""
        epoch, window = stream(start, count, self.read[p], self.seeds[p])
        return epoch, permute(window, self.windows[p], self.seeds[p], 0) if self.kept else window

    @cached_property
    def bounds(self) -> Array:
        """Where each source's range of positions starts, then the length of the cycle: [sources + 1]."""
        return np.cumsum([0, *self.counts], dtype=np.int64)

    @cached_property
    def rows(self) -> int:
        return int(self.bounds[-1])

    @cached_property
    def blocks(self) -> int:
        return -(-self.rows // BLOCK)

    def before(self, position: Array | int, block: int) -> Array:
        """Positions x < `position` that fall to the blocks before `block`: x mod blocks < block."""
        return position // self.blocks * block + np.minimum(position % self.blocks, block)

    def locate(self, row: int) -> tuple[int, int]:
        """(block counted from the start of the run, slot in it) of a row of the run."""
        cycle, row = divmod(row, self.rows)
        size, larger = divmod(self.rows, self.blocks)  # the first `larger` blocks hold one row more
        block = row // (size + 1) if row < larger * (size + 1) else (row - larger) // size
        return cycle * self.blocks + block, row - int(self.before(self.rows, block))


@functools.lru_cache(maxsize=4)
def block_rows(cycle: Cycle, index: int) -> Array:
    """Block `index` of the run: (source, window, epoch) of its slots, int64 [3, slots]."""
    turn, block = divmod(index, cycle.blocks)
    position = np.arange(block, cycle.rows, cycle.blocks)
    position = position[permute(np.arange(len(position)), len(position), cycle.seed, index)]
    source = np.searchsorted(cycle.bounds, position, side="right") - 1
    drawn = turn * np.array(cycle.counts) + np.diff(cycle.before(cycle.bounds, block))
    out = np.empty((3, len(source)), np.int64)
    out[0] = source
    for p in np.unique(source):
        slots = np.flatnonzero(source == p)
        out[2, slots], out[1, slots] = cycle.draws(p, int(drawn[p]), len(slots))
    return out


@dataclass(frozen=True, eq=False)
class Plan:
    """What every step of a run reads: `rows(step)` is a pure function, so its state is the step alone."""

    sources: list[Source]
    windows: list[Windows]
    sequence_length: int
    batch_size: int
    cycle: Cycle
    fingerprint: str  # of the stream of rows; the batch size only cuts it, so it is not part

    def rows(self, step: int) -> tuple[Array, Array, Array]:
        """(source index, window index within the source, epoch of the source) of step `step`, int64 [batch] each."""
        return self.at(step * self.batch_size, self.batch_size)

    def at(self, start: int, count: int) -> tuple[Array, Array, Array]:
        """The same for rows start, ..., start + count - 1 of the run: to go on with another batch size."""
        pieces = []
        while count:
            block, slot = self.cycle.locate(start)
            piece = block_rows(self.cycle, block)[:, slot : slot + count]
            pieces.append(piece)
            start, count = start + piece.shape[1], count - piece.shape[1]
        source, window, epoch = np.concatenate(pieces, axis=1)
        return source, window, epoch

    def read(self, source: Array, window: Array, epoch: Array) -> Array:
        """The tokens of rows as `at` names them: [rows, seq + 1]."""
        tokens = np.empty((len(source), self.sequence_length + 1), np.int64)
        for p in np.unique(source):
            where = np.flatnonzero(source == p)
            self.windows[p].gather(window[where], tokens, where)
        return tokens

    def samples(self, source: Array, window: Array, epoch: Array) -> Array:
        """The id of each of these rows among all training windows: int64 [rows]."""
        return self.offsets[source] + window

    def located(self, sample: Array) -> tuple[Array, Array]:
        """Which window of which source has this id; of `windows`, [rows] each."""
        source = np.searchsorted(self.offsets, sample, side="right") - 1
        return source, sample - self.offsets[source]

    @property
    def fixed(self) -> bool:
        """Whether the windows are those of the shards, by these ids."""
        return True

    def fitting(self, steps: int) -> int:
        """Of a budget of so many steps, those that there are rows for."""
        return steps

    @property
    def pool(self) -> Windows | None:
        """Rows whose loss is measured beside the held-out ones."""
        return None

    def announcement(self) -> str:
        """What is said of it before the first step."""
        return ""

    @cached_property
    def offsets(self) -> Array:
        """Global id of each source's first window: int64 [sources]."""
        return np.cumsum([0, *self.cycle.windows[:-1]], dtype=np.int64)

    def drawn(self, rows: int) -> Array:
        """How many of the first `rows` rows come from each source: int64 [sources]."""
        block, slot = self.cycle.locate(rows)
        turn, within = divmod(block, self.cycle.blocks)
        whole = turn * np.array(self.cycle.counts) + np.diff(self.cycle.before(self.cycle.bounds, within))
        return whole + np.bincount(block_rows(self.cycle, block)[0, :slot], minlength=len(self.sources))

    def uses(self, steps: int) -> dict[str, dict[str, int]]:
        """Of each source: `unique` training tokens, and `tokens` of them that a run of this length draws."""
        drawn = (self.drawn(steps * self.batch_size) * self.sequence_length).tolist()
        used = zip(self.sources, self.unique, drawn, strict=True)
        return {source.name: {"unique": unique, "tokens": tokens} for source, unique, tokens in used}

    @property
    def unique(self) -> list[int]:
        """Training tokens of each source that the run passes over."""
        return [n * self.sequence_length for n in self.cycle.read]

    def table(self, steps: int | None = None) -> str:
        """The mixture as text; with `steps`, what a run of that length draws and how often it repeats it."""
        drawn = self.drawn((steps or 0) * self.batch_size)
        lines = [["source", "share", "windows", "tokens", "rows drawn", "epochs"]]
        c = self.cycle
        for source, count, n, of, k in zip(self.sources, c.counts, c.read, c.windows, drawn, strict=True):
            share, tokens = count / c.rows, n * self.sequence_length
            windows = f"{n:,} of {of:,}" if c.kept else f"{n:,}"
            lines.append([source.name, f"{share:.2%}", windows, f"{tokens:,}", f"{k:,}", f"{k / n:.2f}"])
        return aligned([line[: 4 if steps is None else 6] for line in lines])


@dataclass(frozen=True, eq=False)
class ReshuffledPlan(Plan):
    """The same with windows that are cut anew in each epoch of their source; their ids are counted over all epochs."""

    anew: list[Reshuffled]

    def read(self, source: Array, window: Array, epoch: Array) -> Array:
        tokens = np.empty((len(source), self.sequence_length + 1), np.int64)
        for p in np.unique(source):
            where = np.flatnonzero(source == p)
            self.anew[p].gather(window[where], epoch[where], tokens, where)
        return tokens

    def samples(self, source: Array, window: Array, epoch: Array) -> Array:
        return self.offsets[source] + window + epoch * sum(self.cycle.windows)

    @property
    def fixed(self) -> bool:
        return False


def aligned(lines: list[list[str]]) -> str:
    """A table as text: the first column to the left, numbers to the right."""
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    name, *numbers = ([cell.rjust(w) for cell in column] for column, w in zip(columns, widths, strict=True))
    name = [cell.strip().ljust(widths[0]) for cell in name]
    return "\n".join(map("  ".join, zip(name, *numbers, strict=True)))


def plan(
    dataset: Dataset,
    sequence_length: int,
    batch_size: int,
    seed: int,
    sources: Sequence[Source] | None = None,
    steps: int | None = None,
    share: Fraction | None = None,
    reshuffle: bool = False,
) -> Plan:
    """Plan the training rows of a run.

    Args:
        batch_size: rows of one step over all ranks.
        sources: what to mix; None: all, and every window of every source exactly once an epoch.
        steps: steps of the whole run; needed when some sources have epochs and others weights, checked when all have
            epochs, which then have to fill the run to within one batch.
        share: of the target's steps, where the run is a proxy, see proxy.py; None: it is none.
        reshuffle: cut the windows of each epoch from the documents in an order of its own.
    """
    chosen, windows = choose_sources(dataset, sequence_length, sources)
    names, seeds = [source.name for source in chosen], [named_seed(seed, source.name) for source in chosen]
    anew = [
        Reshuffled(
            dataset.documents(source.name, source.where), sequence_length, named_seed(seed, f"{source.name}/documents")
        )
        for source in chosen
        if reshuffle
    ]
    lengths = tuple(map(len, anew or windows))
    kept = None if share is None else kept_windows(names, lengths, share)
    counts = cycle_counts(chosen, kept or lengths, batch_size, steps)
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise DataError(f"source {name!r} would never be drawn, its share is below one row; raise it or omit it")
    cycle = Cycle(tuple(counts), lengths, tuple(seeds), seed, kept)
    identity = [dataset.fingerprint, sequence_length, seed, names, counts]
    if any(source.where for source in chosen):
        identity.append([source.where for source in chosen])
    if kept:
        identity.append({"kept": kept})
    parts = chosen, windows, sequence_length, batch_size, cycle
    if reshuffle:
        return ReshuffledPlan(*parts, digest([*identity, "documents"]), anew)
    return Plan(*parts, digest(identity))


def digest(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def choose_sources(
    dataset: Dataset, sequence_length: int, sources: Sequence[Source] | None
) -> tuple[list[Source], list[Windows]]:
    """Those that were asked for, or all, and their windows. DataError for what cannot be mixed."""
    chosen = list(sources or map(Source, dataset.sources))
    names = [source.name for source in chosen]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"source {min(repeated)!r} is listed twice; list it once, with the sum of its weights")
    if len({source.weight is None and source.epochs is None for source in chosen}) > 1:
        raise DataError("some sources have a weight or epochs and others neither; give one to each source or to none")
    windows = [dataset.windows(source.name, "train", sequence_length, source.where) for source in chosen]
    for source, found in zip(chosen, windows, strict=True):
        if len(found) == 0:
            where = f" where {source.where}" if source.where else ""
            raise DataError(
                f"{dataset.path}: source {source.name!r} has {found.tokens} training tokens{where}, and a window takes "
                f"{sequence_length + 1}; leave it out, prepare more text, or shorten the sequence"
            )
    return chosen, windows


def named_seed(seed: int, name: str) -> int:
    """The key of a source's own order: the same alone and in any mixture, and different from every other source's."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
