"""How many rows of a cycle each source of a mixture gets: what is asked for, in whole numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from thriftlab.data.errors import DataError

BLOCK = 1024  # rows, in which weights are exact


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
