"""Controlled repetition (arXiv 2205.10487): a part of what a run sees is a small pool, seen again and again; the rest
is seen once.

Of S units the first floor(fraction * S + 1/2) slots are to be repeats; the pool has P = slots // repeats items, each in
exactly `repeats` of them, and the slots that are left over are seen once like all others. A keyed bijection gives unit
g of the run its slot, another one (by `pool_seed`) gives items their places in the source: the pool is taken from its
front, so pools are nested, and what is seen once from its end, so that it is the same for every pool and control.

    slot = permute(g, S, seed)
    item = slot mod P           if slot < P * repeats          (spacing "random")
           N - S + slot         otherwise; of N items in the source
    id   = permute(item, N, pool_seed)

The surprise: with fraction 1 there is nothing to hide among, and the pool is read epoch after epoch, each in its own
order (arXiv 2305.16264).
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thriftlab.data.amounts import of_documents, of_units
from thriftlab.data.errors import DataError
from thriftlab.data.order import permute, unpermute
from thriftlab.data.ranks import Ranks
from thriftlab.data.spread import spread

Array = NDArray[np.int64]
Unit = Literal["sequence", "document"]
Control = Literal["fresh", "unique_only"]
Spacing = Literal["random", "even", "clustered"]

PIECE = 2**16  # units of the audit at a time


class Source(Protocol):
    """What is repeated: a list of windows or documents, for example. A `fingerprint` of it is taken if it has one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Occurrence(NamedTuple):
    item_id: int  # in the source
    exposure: int  # how often the item was seen before
    is_repeat: bool  # whether the item is one of the pool


class ControlledRepetition:
    """The units of a run by their number g: `self[g]` is a pure function, whatever the batch and the number of ranks.

    Args:
        source: what is drawn from.
        total_units: units of the run; or total_tokens. Documents are counted in tokens only.
        fraction: of the units (of the tokens, for documents) that are repeats; in (0, 1].
        repeats: how often each item of the pool is seen; or pool_size, its items; or pool_tokens.
        unit: of one item. A document of the source is an array of tokens.
        seed: of the order.
        pool_seed: of the choice of items; None: seed.
        spacing: of the exposures of one item among the repeats. even: the whole pool, again and again in one order.
            clustered: one after the other.
        control: fresh: every slot has an item of its own. unique_only: the run without the slots of repeats, in the
            same order.
        max_same_per_step: how often one item may be in one step of `batch_size` units.
        holdout_ids: items of the source that are not drawn, nor others of the same content.
        holdout_hashes: `content_hash` of what is not drawn either.
        start_index: where iteration starts.
    """

    def __init__(
        self,
        source: Source,
        total_units: int | None = None,
        fraction: float = 0.0,
        repeats: int | None = None,
        *,
        total_tokens: int | None = None,
        pool_size: int | None = None,
        pool_tokens: int | None = None,
        unit: Unit = "sequence",
        seed: int = 0,
        pool_seed: int | None = None,
        spacing: Spacing = "random",
        control: Control | None = None,
        max_same_per_step: int | None = None,
        batch_size: int | None = None,
        holdout_ids: Collection[int] = (),
        holdout_hashes: Collection[str] = (),
        start_index: int = 0,
    ):
        self.source, self.unit, self.spacing, self.control = source, unit, spacing, control
        self.seed, self.pool_seed = seed, seed if pool_seed is None else pool_seed
        self.in_epochs = fraction == 1 and spacing == "random" and control is None
        self.next = start_index
        self.held_out, self.held_hashes = held_out(source, holdout_ids, holdout_hashes)
        self.items = len(source) - len(self.held_out)  # that may be drawn
        one_of("total_units", total_units, "total_tokens", total_tokens)
        one_of("repeats", repeats, "pool_size", pool_size, "pool_tokens", pool_tokens)
        if not 0 < fraction <= 1:
            raise DataError(f"fraction = {fraction}: the part that is repeated lies in (0, 1]")
        if unit == "document":
            if total_tokens is None:
                raise DataError("unit = document: the fraction is one of tokens; give total_tokens, not total_units")
            asked = fraction, repeats, pool_size, pool_tokens
            self.amounts = of_documents(self.lengths(np.arange(self.items)), total_tokens, *asked, control)
        else:
            units = total_units or (total_tokens or 0) // unit_tokens(source)
            pool_size = pool_tokens // unit_tokens(source) if pool_tokens is not None else pool_size
            self.amounts = of_units(self.items, units, fraction, repeats, pool_size, control, self.in_epochs)
        self.max_same = max_same_per_step, batch_size if max_same_per_step is not None else None
        if max_same_per_step is not None and (batch_size is None or spacing == "clustered" or self.in_epochs):
            raise DataError(
                "max_same_per_step needs batch_size, the units of one step, and goes neither with spacing = clustered "
                "nor with fraction = 1; leave it out"
            )
        said = [unit, self.amounts, spacing, control, seed, self.pool_seed, self.max_same, self.held_out.tolist()]
        self.config_hash = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()

    def __len__(self) -> int:
        return self.amounts.rows

    def __getitem__(self, g: int) -> Any:
        return self.source[self.occurrence_of(g)[0]]

    def __iter__(self) -> Iterator[Any]:
        """On from where it is: `state_dict` after some items continues with the next."""
        while self.next < len(self):
            self.next += 1
            yield self[self.next - 1]

    # ------------------------------------------------------------------------------------------------ the map

    def at(self, g: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
        """Ids in the source of units `g` of the run, and which of them are repeats: [units] each."""
        number, repeat = self.numbers(np.asarray(g, np.int64))
        return self.ids(number), repeat

    def numbers(self, g: Array) -> tuple[Array, NDArray[np.bool_]]:
        """The numbers of the items before the choice by `pool_seed`: the pool is 0 ... P - 1."""
        slot = self.slots(g)
        repeat = slot < self.amounts.repeat_slots
        number = self.items - self.amounts.slots + slot
        number[repeat] = self.pool_numbers(g[repeat], slot[repeat])
        if self.amounts.partial:  # of the source nothing is left: another epoch begins
            number[~repeat] = self.pool_numbers(g[~repeat], slot[~repeat])
            repeat[:] = True
        return number, repeat

    def slots(self, g: Array) -> Array:
        if self.in_epochs:
            return g.copy()
        if self.control == "unique_only":
            g = self.ranks.select(g)
        return permute(g, self.amounts.slots, self.seed, 0)

    def pool_numbers(self, g: Array, slot: Array) -> Array:
        size, repeats = self.amounts.pool_size, self.amounts.repeats
        if self.in_epochs:
            return permute(slot % size, size, self.seed, slot // size)
        if self.max_same[0] is not None:
            return self.spread[self.ranks.rank(g)]
        if self.spacing == "random":
            return slot % size
        return self.ranks.rank(g) % size if self.spacing == "even" else self.ranks.rank(g) // repeats

    def ids(self, number: Array) -> Array:
        """Where items are in the source: its items in the order of `pool_seed`, over those that are held out."""
        found = permute(number, self.items, self.pool_seed, 0)
        return found + np.searchsorted(self.held_out - np.arange(len(self.held_out)), found, side="right")

    @cached_property
    def ranks(self) -> Ranks:
        """The units of repeats in their order; for control = unique_only those of the others."""
        n, border, seed = self.amounts.slots, self.amounts.border, self.seed
        if self.control == "unique_only":
            return Ranks(n, lambda g: permute(g, n, seed, 0) >= border)
        return Ranks(n, lambda g: permute(g, n, seed, 0) < border)

    @cached_property
    def spread(self) -> Array:
        """The pool's number of each repeat in turn, changed until no step has one too often: [repeat slots]."""
        most, batch_size = self.max_same
        g = self.ranks.select(np.arange(self.amounts.repeat_slots))
        size = self.amounts.pool_size
        wish = permute(g, self.amounts.slots, self.seed, 0) if self.spacing == "random" else np.arange(len(g))
        return spread(wish % size, g // (batch_size or 1), most or 1, self.seed)

    # ------------------------------------------------------------------------------------------ what is asked

    def occurrence(self, g: int) -> Occurrence:
        """Which item unit g is, how often it was seen before, and whether it is one of the pool; O(repeats)."""
        item, number, repeat = self.occurrence_of(g)
        return Occurrence(item, self.exposure(g, number) if repeat else 0, repeat)

    def occurrence_of(self, g: int) -> tuple[int, int, bool]:
        """(id, number, whether it is a repeat)."""
        if not 0 <= g < len(self):
            raise IndexError(f"unit {g} of {len(self)}")
        number, repeat = self.numbers(np.array([g]))
        return int(self.ids(number)[0]), int(number[0]), bool(repeat[0])

    def exposure(self, g: int, number: int) -> int:
        size, repeats = self.amounts.pool_size, self.amounts.repeats
        if self.in_epochs:
            return g // size
        if self.max_same[0] is not None:
            return int((self.spread[: int(self.ranks.rank(np.array([g]))[0])] == number).sum())
        if self.spacing == "random":
            copies = number + np.arange(repeats) * size
            return int((unpermute(copies, self.amounts.slots, self.seed, 0) < g).sum())
        rank = int(self.ranks.rank(np.array([g]))[0])
        return rank // size if self.spacing == "even" else rank % repeats

    def epochs_seen(self, g: int) -> dict[str, float]:
        """Passes over the source and over the pool before unit g."""
        seen = min(g, self.amounts.counts[0]) if self.in_epochs else 0 if self.control else self.ranks.before(g)
        return {"source": g / self.items, "pool": seen / self.amounts.pool_size}

    def plan(self) -> dict[str, Any]:
        """All counts."""
        return {"unit": self.unit, "spacing": self.spacing, "control": self.control, **self.amounts.told(),
                "source_items": self.items, "seed": self.seed, "pool_seed": self.pool_seed}  # fmt: skip

    def lengths(self, number: Array) -> Array:
        """Tokens of documents by their numbers."""
        ids = self.ids(number)
        found = getattr(self.source, "lengths", None)
        return found[ids] if found is not None else np.array([len(self.source[i]) for i in ids.tolist()], np.int64)

    # -------------------------------------------------------------------------------------- state and the audit

    @cached_property
    def source_fingerprint(self) -> str:
        if given := getattr(self.source, "fingerprint", None):
            return str(given)
        return digest(content_hash(self.source[i]).encode() for i in range(len(self.source)))

    def state_dict(self) -> dict[str, Any]:
        return {"next_global_index": self.next, "config_hash": self.config_hash,
                "source_fingerprint": self.source_fingerprint}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. DataError where it is the state of another plan or source."""
        for key in ("config_hash", "source_fingerprint"):
            if state[key] != getattr(self, key):
                raise DataError(
                    f"the state is of another {key.replace('_', ' ')}, {state[key][:16]}, and this is "
                    f"{getattr(self, key)[:16]}; go on with the settings and the data that it was saved with"
                )
        self.next = int(state["next_global_index"])

    def audit(self) -> dict[str, Any]:
        """Read off the whole run: {"rows", "sha256" of all ids in order (int64), "multiplicity": {exposures: items},
        "holdout_overlap"}. DataError where something that is held out is seen."""
        pieces = [self.at(np.arange(k, min(k + PIECE, len(self))))[0] for k in range(0, len(self), PIECE)]
        ids = np.concatenate([np.empty(0, np.int64), *pieces])
        items, seen = np.unique(ids, return_counts=True)
        overlap = set(items.tolist()) & set(self.held_out.tolist())
        if self.held_hashes:
            overlap |= {i for i in items.tolist() if content_hash(self.source[i]) in self.held_hashes}
        if overlap:
            raise DataError(f"item {min(overlap)} of the source is held out and would be trained on; prepare again")
        exposures, count = np.unique(seen, return_counts=True)
        return {
            "rows": len(ids),
            "sha256": digest(piece.astype("<i8").tobytes() for piece in pieces),
            "multiplicity": dict(zip(exposures.tolist(), count.tolist(), strict=True)),
            "holdout_overlap": len(overlap),
        }


def one_of(*pairs: Any) -> None:
    given = dict(zip(pairs[::2], pairs[1::2], strict=True))
    found = [name for name, value in given.items() if value is not None]
    if len(found) != 1:
        raise DataError(f"give one of {', '.join(given)}; there is {' and '.join(found) or 'none'}")


def unit_tokens(source: Source) -> int:
    """Predicted tokens of a window, or all of a sequence that is not one."""
    return getattr(source, "sequence_length", None) or len(source[0])


def content_hash(item: Any) -> str:
    """sha256 of a text, bytes, or tokens in whatever type of integer."""
    if isinstance(item, str | bytes):
        return hashlib.sha256(item.encode() if isinstance(item, str) else item).hexdigest()
    return hashlib.sha256(np.asarray(item).astype("<i8").tobytes()).hexdigest()


def held_out(source: Source, ids: Collection[int], hashes: Collection[str]) -> tuple[Array, set[str]]:
    """Sorted ids of all items of the source that are held out, by id or content, and their hashes."""
    held = {*hashes, *(content_hash(source[i]) for i in ids)}
    found = {i for i in range(len(source)) if content_hash(source[i]) in held} if held else set()
    return np.array(sorted(found | set(ids)), np.int64), held


def digest(pieces: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()
