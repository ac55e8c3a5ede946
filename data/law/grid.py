"""The published fit of the utility law: an exhaustive grid, sum of squared errors, one pool at a time.

The reference code shuffles its grid without a seed and stops after 100 000 evaluations, so with a free `a` it searches
a random tenth. Here the search is complete, and ties go to the first of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thriftlab.data.law.points import Point
from thriftlab.data.law.utility import SAMPLES, Array, Pool, UtilityLaw, segments

B = np.linspace(-0.005, -0.5, 100)
TAU = np.linspace(1, 10, 100)
A = np.linspace(0.0001, 0.02, 100)  # for one pool alone
SHARED_A = (0.01, 0.015, 0.018, 0.02, 0.022, 0.025, 0.03)  # for all pools of a task together
SHARED_D = np.linspace(0.02, 0.15, 10)


@dataclass(frozen=True)
class GridFit:
    """`sse` is the mean over pools; law.pools are in the order in which the points name them."""

    law: UtilityLaw
    a: float
    d: float
    sse: float


def fit_grid(
    points: Sequence[Point],
    a: float | Sequence[float] | Array = SHARED_A,
    d: float | Sequence[float] | Array = SHARED_D,
    s: float = SAMPLES,
    quirk: bool = False,
) -> GridFit:
    """b and tau of each pool, and the a and d that they share; a number for a or d fixes it."""
    pools: dict[str, list[Point]] = {}
    for point in points:
        (name,) = point.unique
        pools.setdefault(name, []).append(point)
    tables = {name: [exposures(point) for point in own] for name, own in pools.items()}
    fits = []
    for one_a in np.atleast_1d(a):
        for one_d in np.atleast_1d(d):
            found = {name: search(tables[name], own, one_a / s, one_d, quirk) for name, own in pools.items()}
            sse = float(np.mean([error for *_, error in found.values()]))
            b, tau, _ = zip(*found.values(), strict=True)
            sizes = [own[0].unique[name] for name, own in pools.items()]
            chosen = tuple(map(Pool, pools, sizes, b, tau))
            law = UtilityLaw(chosen, float(one_d), n_ref=float(s / one_a), quirk=quirk)
            fits.append(GridFit(law, float(one_a), float(one_d), sse))
    return min(fits, key=lambda one: one.sse)


def exposures(point: Point) -> tuple[float, Array]:
    """ln n_0, and sum_k delta^k ln(n_k / n_(k-1)) of the later epochs for every tau: [TAU]."""
    (unique,) = point.unique.values()
    edges, epochs = segments(point.tokens, [unique], TAU[-1:])
    later = np.exp2(-epochs[0, 1:] / TAU[:, None]) @ np.log(edges[2:] / edges[1:-1])
    return float(np.log(edges[1])), later


def search(
    table: Sequence[tuple[float, Array]], points: Sequence[Point], scale: float, d: float, quirk: bool
) -> tuple[float, float, float]:
    """(b, tau, sum of squared errors) of the best grid point."""
    errors = np.zeros((len(B), len(TAU)))
    for (first, later), point in zip(table, points, strict=True):
        start, rest = np.exp(B * (first + np.log(scale)))[:, None], np.exp(np.outer(B, later))
        errors += (((d + start) * rest if quirk else d + start * rest) - point.loss) ** 2
    b, tau = np.unravel_index(int(errors.argmin()), errors.shape)
    return float(B[b]), float(TAU[tau]), float(errors.min())
