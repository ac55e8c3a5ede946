"""What can be claimed from a few paired runs.

Two methods that share a seed share data order and initialisation, so it is their difference that is looked at: a t
interval of the mean difference decides, and a percentile bootstrap (Efron 1979) is a second opinion.
One surprise: with three seeds no bootstrap interval can be honest. It never leaves the range of the data, which misses
the truth once in four times; the t interval knows how little three numbers say.

Intervals are one per comparison and not simultaneous: each answers "how far is this method from the baseline", a
question asked beforehand. Of k such intervals one or more may miss with a chance of up to k * 5 %; who picks the best
of many methods should repeat that one on new seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
MANY_SEEDS = 1000


@dataclass(frozen=True)
class Paired:
    """Differences treatment - baseline over the seeds that both have. Intervals are None where n < 2."""

    n: int
    dropped: int
    mean: float
    sd: float | None
    t: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    p: float | None  # of the t test of no difference, two-sided

    @property
    def resolved(self) -> bool:
        """Whether there is an interval, and 0 lies outside it."""
        return self.t is not None and not self.t[0] <= 0 <= self.t[1]


def paired(treatment: Mapping[int, float], baseline: Mapping[int, float], level: float = LEVEL) -> Paired | None:
    """Paired differences of two {seed: value}; seeds of one side only are dropped and counted. None without a pair."""
    seeds = sorted(treatment.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([treatment[seed] - baseline[seed] for seed in seeds])
    enough = len(seeds) > 1
    return Paired(
        n=len(seeds),
        dropped=len(treatment.keys() ^ baseline.keys()),
        mean=float(differences.mean()),
        sd=float(differences.std(ddof=1)) if enough else None,
        t=t_interval(differences, level) if enough else None,
        bootstrap=bootstrap_interval(differences, level) if enough else None,
        p=t_test(differences) if enough else None,
    )


def t_interval(sample: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of two or more values."""
    values = np.asarray(sample, dtype=np.float64)
    mean, half = float(values.mean()), half_width(float(values.std(ddof=1)), len(values), level)
    return mean - half, mean + half


def t_test(sample: ArrayLike) -> float:
    """Two-sided p of Student's test that the mean of two or more values is 0."""
    values = np.asarray(sample, dtype=np.float64)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): to reject those below 0.05 is to reject wrongly, once or more, in 5 % at most."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
    for turn, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - turn) * ps[i]))
        adjusted[i] = largest
    return adjusted


def bootstrap_interval(sample: ArrayLike, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; the same sample and seed give the same interval."""
    found = stats.bootstrap(
        (np.asarray(sample, dtype=np.float64),), np.mean, n_resamples=RESAMPLES, confidence_level=level,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def half_width(sd: float, n: int, level: float = LEVEL) -> float:
    """Half of the t interval of a mean of n >= 2 values whose standard deviation is sd."""
    return float(stats.t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)


def seeds_to_resolve(difference: float, sd: float, level: float = LEVEL) -> int | None:
    """Smallest n >= 2 whose half-width is below |difference|, were sd the truth; None if more than MANY_SEEDS."""
    enough = (n for n in range(2, MANY_SEEDS + 1) if half_width(sd, n, level) < abs(difference))
    return next(enough, None)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats (lower is better on both axes), by the first axis."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])
