"""How much of a run is repeated: whole numbers, exactly, and what is left over."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.errors import DataError


@dataclass(frozen=True)
class Amounts:
    """Of a plan without a control, but for `rows`, `repeat_slots` and `border`, which are those of the control."""

    fraction: Fraction
    slots: int
    asked: int  # slots for repeats, of which pool_size * repeats are used and the others are seen once
    pool_size: int
    repeats: int
    rows: int  # units of the run
    repeat_slots: int
    border: int  # slots below it are what a control replaces or leaves out
    partial: bool = False  # whether the last rows begin an epoch again, because the source has nothing else
    tokens: tuple[int, int, int] | None = None  # of the pool, of all its exposures, of the run; for documents

    @property
    def realised(self) -> Fraction:
        if not self.repeat_slots:
            return Fraction(0)
        if self.tokens:
            return Fraction(*self.tokens[1:])
        return Fraction(1) if self.partial else Fraction(self.repeat_slots, self.rows)

    @property
    def counts(self) -> tuple[int, int]:
        """Rows of repeats, and of the others."""
        repeats = self.rows if self.partial else self.repeat_slots
        return repeats, self.rows - repeats

    def told(self) -> dict[str, Any]:
        repeats, once = self.counts
        told = {
            "rows": self.rows,
            "fraction": float(self.fraction),
            "realised_fraction": float(self.realised),
            "pool_size": self.pool_size,
            "repeats": self.repeats,
            "repeat_slots": repeats,
            "left_over": self.asked - self.pool_size * self.repeats,
            "unique_items": once,
            "distinct_items": once + (self.pool_size if self.repeat_slots else 0),
        }
        return told | dict(zip(("pool_tokens", "repeat_tokens", "tokens"), self.tokens or (), strict=False))


def of_units(
    items: int,
    slots: int,
    fraction: float,
    repeats: int | None,
    pool_size: int | None,
    control: str | None,
    in_epochs: bool,
) -> Amounts:
    """Windows or other units that all count alike; `items` of them are in the source. Where the pool is read epoch
    after epoch, what is left over begins another one if the source has nothing else."""
    exact = Fraction(str(fraction))
    asked = math.floor(exact * slots + Fraction(1, 2))
    repeats, pool_size = divided(asked, repeats, pool_size, f"{fraction} of {slots} units are {asked}")
    used = pool_size * repeats
    partial = in_epochs and items < slots - used + pool_size
    need = {None: slots - used + pool_size, "fresh": slots, "unique_only": slots - asked}[control]
    enough(items, pool_size if partial else need, "items")
    rows = slots - asked if control == "unique_only" else slots
    border = asked if control else used
    return Amounts(exact, slots, asked, pool_size, repeats, rows, 0 if control else used, border, partial)


def divided(asked: int, repeats: int | None, pool_size: int | None, said: str) -> tuple[int, int]:
    """(repeats, size of the pool). DataError where one of them is none, which would silently be a run without."""
    repeats = repeats if repeats is not None else asked // max(pool_size or 0, 1)
    pool_size = pool_size if pool_size is not None else asked // max(repeats, 1)
    if repeats < 1 or pool_size < 1:
        raise DataError(
            f"the pool of repeated data is empty: {said}, for {max(pool_size, 1)} items seen {max(repeats, 1)} times "
            "each; raise the fraction or the length of the run, or lower the repeats or the size of the pool"
        )
    return repeats, pool_size


def enough(have: int, need: int, what: str) -> None:
    if have < need:
        raise DataError(
            f"the run sees {need:,} different {what}, and the source has {have:,}; shorten the run, repeat more, or "
            "prepare more text"
        )


def of_documents(
    lengths: NDArray[np.int64],
    total: int,
    fraction: float,
    repeats: int | None,
    pool_size: int | None,
    pool_tokens: int | None,
    control: str | None,
) -> Amounts:
    """Documents of these lengths, in the order in which they are chosen: the pool from the front until its exposures
    reach the fraction of `total` tokens, what is seen once from the end until all is reached."""
    exact = Fraction(str(fraction))
    asked = exact * total
    front, back = np.cumsum(lengths), np.cumsum(lengths[::-1])
    if repeats is not None:
        pool_size = first(front, math.ceil(asked / max(repeats, 1)))
    elif pool_tokens is not None:
        pool_size = first(front, pool_tokens)
    enough(len(lengths), pool_size or 0, "documents")
    pool = int(front[pool_size - 1]) if pool_size else 0
    repeats = repeats if repeats is not None else math.floor(asked / max(pool, 1))
    repeats, size = divided(0, repeats, pool_size or 0, f"{fraction} of {total} tokens, of a pool of {pool} tokens")
    repeated = pool * repeats
    if repeated >= total and exact < 1:
        raise DataError(
            f"the pool of {size} whole documents has {pool:,} tokens, {repeats} times that is all of {total:,} tokens "
            "and more; lower the repeats, or lengthen the run"
        )
    once = first(back, total - repeated)
    fresh = first(back, total)
    enough(len(lengths), {None: size + once, "fresh": fresh, "unique_only": once}[control], "documents")
    slots = fresh if control == "fresh" else size * repeats + once
    rows = once if control == "unique_only" else slots
    used, border = (0 if control else size * repeats), (0 if control == "fresh" else size * repeats)
    whole = (0 if control else repeated) + (
        int(back[(fresh if control == "fresh" else once) - 1]) if rows > used else 0
    )
    return Amounts(exact, slots, size * repeats, size, repeats, rows, used, border, tokens=(pool, repeated, whole))


def first(sums: NDArray[np.int64], wanted: int) -> int:
    """How many of the first it takes until the sum reaches what is wanted; one more than there are if it never does."""
    return 0 if wanted <= 0 else int(np.searchsorted(sums, wanted)) + 1
