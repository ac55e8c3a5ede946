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
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.errors import DataError
from thriftlab.data.order import permute, stream
from thriftlab.data.proxy import kept_windows
from thriftlab.data.shards import Dataset, Windows

BLOCK = 1024

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A source by name, and how much of it: a `weight` (share of the rows) or `epochs` (passes over the run); not both.

    Epochs are exact over the whole run, weights to 1/1024 in every block of 1024 rows. `where` chooses documents by
    their scores, as "score>0.7": the source is then what is chosen.
    """

    name: str
    weight: float | None = None
    epochs: float | None = None
    where: str | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and self.epochs is not None:
            raise DataError(f"source {self.name!r}: give weight or epochs, not both")
        for key in ("weight", "epochs"):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise DataError(f"source {self.name!r}: {key} is {value}; it must be a positive number")


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

    def table(self, steps: int | None = None) -> str:
        """The mixture as text; with `steps`, what a run of that length draws and how often it repeats it."""
        drawn = self.drawn((steps or 0) * self.batch_size)
        lines = [["source", "share", "windows", "tokens", "rows drawn", "epochs"]]
        c = self.cycle
        for source, count, n, of, k in zip(self.sources, c.counts, c.read, c.windows, drawn, strict=True):
            share, tokens = count / c.rows, n * self.sequence_length
            windows = f"{n:,} of {of:,}" if c.kept else f"{n:,}"
            lines.append([source.name, f"{share:.2%}", windows, f"{tokens:,}", f"{k:,}", f"{k / n:.2f}"])
        columns = list(zip(*lines, strict=True))[: 4 if steps is None else 6]
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
) -> Plan:
    """Plan the training rows of a run.

    Args:
        batch_size: rows of one step over all ranks.
        sources: what to mix; None: all, and every window of every source exactly once an epoch.
        steps: steps of the whole run; needed when some sources have epochs and others weights, checked when all have
            epochs, which then have to fill the run to within one batch.
        share: of the target's steps, where the run is a proxy, see proxy.py; None: it is none.
    """
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
    lengths = tuple(map(len, windows))
    kept = None if share is None else kept_windows(names, lengths, share)
    counts = cycle_counts(chosen, kept or lengths, batch_size, steps)
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise DataError(f"source {name!r} would never be drawn, its share is below one row; raise it or omit it")
    cycle = Cycle(tuple(counts), lengths, tuple(named_seed(seed, name) for name in names), seed, kept)
    identity = [dataset.fingerprint, sequence_length, seed, names, counts]
    if any(source.where for source in chosen):
        identity.append([source.where for source in chosen])
    if kept:
        identity.append({"kept": kept})
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Plan(chosen, windows, sequence_length, batch_size, cycle, digest)


def named_seed(seed: int, name: str) -> int:
    """The key of a source's own order: the same alone and in any mixture, and different from every other source's."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def cycle_counts(sources: Sequence[Source], windows: Sequence[int], batch_size: int, steps: int | None) -> list[int]:
    """Rows of each source in one cycle: an epoch of everything, the whole run, or 1024 slots divided by weight."""
    fixed = [round((source.epochs or 0) * n) for source, n in zip(sources, windows, strict=True)]
    weights = [Fraction(source.weight or 0) for source in sources]
    if all(source.epochs is None and source.weight is None for source in sources):
        return list(windows)
    if all(source.epochs is None for source in sources):
        return largest_remainder(BLOCK, weights)
    if all(source.weight is None for source in sources):
        _check_length(sum(fixed), batch_size, steps)
        return fixed
    if steps is None:
        raise DataError("epochs beside weights need a run of known length: set the budget in tokens or FLOPs")
    rest = steps * batch_size - sum(fixed)
    if rest <= 0:
        raise DataError(
            f"the epochs asked for are {sum(fixed)} rows and the run has {steps} steps of {batch_size}, which leaves "
            "nothing for the weighted sources; lengthen the run or lower the epochs"
        )
    return [exact + share for exact, share in zip(fixed, largest_remainder(rest, weights), strict=True)]


def _check_length(rows: int, batch_size: int, steps: int | None) -> None:
    if steps is not None and abs(steps * batch_size - rows) >= batch_size:
        raise DataError(
            f"the epochs asked for are {rows} rows, {rows / batch_size:.1f} steps of {batch_size}, and the run has "
            f"{steps} steps; set the budget to that, or give one source a weight instead of epochs to take the rest"
        )


def largest_remainder(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Divide `total` by weight in whole numbers (Hamilton's method); ties go to the first listed."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda p: counts[p] - exact[p])
    for p in order[: total - sum(counts)]:
        counts[p] += 1
    return counts
