"""What the law is fitted to: the final held-out losses of finished runs, and which of them it can describe.

Every point is a run of its own that ended at its budget, never an intermediate point of a longer schedule.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thriftlab.data.errors import DataError

RISE = 1e-3  # a loss has risen when it is higher than before by this part, or by two standard deviations over seeds


@dataclass(frozen=True)
class Point:
    """`unique` tokens of each pool in use; `weights` None: in proportion to them."""

    tokens: float
    loss: float
    unique: Mapping[str, float]
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not (0 < self.tokens < math.inf and 0 < self.loss < math.inf):
            raise DataError(f"a point has {self.tokens} tokens and the loss {self.loss}; both are positive numbers")
        if not self.unique or set(self.weights or self.unique) != set(self.unique):
            raise DataError(f"a point has weights of {sorted(self.weights or {})} and pools {sorted(self.unique)}")

    @property
    def shares(self) -> dict[str, float]:
        given = self.weights or self.unique
        total = math.fsum(given.values())
        return {name: weight / total for name, weight in given.items()}

    @property
    def epochs(self) -> dict[str, float]:
        return {name: self.tokens * share / self.unique[name] for name, share in self.shares.items()}

    @property
    def mixture(self) -> tuple[tuple[str, float, float], ...]:
        """What points of one curve have in common: name, share and unique tokens of every pool."""
        return tuple((name, round(self.shares[name], 6), self.unique[name]) for name in sorted(self.unique))


def before_the_rise(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """(points to fit, points past the minimum of their curve): the law has no loss that rises with repetition."""
    curves = defaultdict(list)
    for point in points:
        curves[point.mixture].append(point)
    end = {mixture: first_rise(curve) for mixture, curve in curves.items()}
    fitted = [point for point in points if point.tokens < end[point.mixture]]
    return fitted, [point for point in points if point.tokens >= end[point.mixture]]


def first_rise(curve: Sequence[Point]) -> float:
    """The fewest tokens with repetition at which the mean loss over seeds has risen; inf if it never has."""
    budgets = sorted({point.tokens for point in curve})
    losses = {n: [point.loss for point in curve if point.tokens == n] for n in budgets}
    repeats = {point.tokens: max(point.epochs.values()) > 1 for point in curve}
    spread = max((statistics.stdev(seeds) for seeds in losses.values() if len(seeds) > 1), default=0.0)
    lowest = math.inf
    for n in budgets:
        mean = statistics.fmean(losses[n])
        if repeats[n] and mean > lowest + max(RISE * lowest, 2 * spread):
            return n
        lowest = min(lowest, mean)
    return math.inf
