"""The law as a function of its parameters, for all points at once, with derivatives.

The exponent of a mixture is a sum over its pools, so each pool of each point is one row with epochs of its own:

    ln(y - E) = ln A + sum over rows of w b (g(tau) - ln n_ref)
    g = sum over epochs of (1/2)^(k / tau') ln(n_k / n_(k-1)),    n_(-1) = 1

Parameters: E, ln A, ln n_ref, then b of each pool, then ln tau of each pool.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from thriftlab.data.law.points import Point
from thriftlab.data.law.utility import Array, segments

DELTA = 1e-3  # of Huber's loss, on ln L
SHARED = 3  # E, ln A, ln n_ref
B_BOUNDS, TAU_BOUNDS = (-0.5, -0.005), (0.5, 100.0)
LARGEST_E = 0.999  # of the lowest loss
REFERENCE_TOKENS = 1e-6  # a fitted n_ref is at least this part of the smallest n

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Design:
    """The rows of all points, padded to the longest: pool, point, weight [rows], decay exponents and logs [rows, k]."""

    names: tuple[str, ...]
    pool: NDArray[np.int64]
    point: NDArray[np.int64]
    weight: Array
    repeats: Array  # k / (tau' / tau)
    logs: Array
    observed: Array  # ln L [points]
    low: Array
    high: Array

    @property
    def size(self) -> int:
        return len(self.low)

    def tau_at(self, pool: int) -> int:
        return SHARED + len(self.names) + pool

    def exposure(self, log_tau: Array) -> tuple[Array, Array]:
        """g and its derivative by ln tau: [rows]."""
        halvings = self.repeats / np.exp(log_tau[self.pool])[:, None]
        terms = np.exp2(-halvings) * self.logs
        return terms.sum(1), math.log(2) * (terms * halvings).sum(1)

    def gather(self, rows: Array) -> Array:
        return np.bincount(self.point, rows, len(self.observed)).astype(np.float64)

    def predict(self, theta: Array) -> tuple[Array, Array]:
        """ln y [points], and its Jacobian [points, parameters]."""
        count = len(self.names)
        b, log_tau = theta[SHARED : SHARED + count], theta[SHARED + count :]
        g, slope = self.exposure(log_tau)
        g = g - theta[2]
        power = np.exp(theta[1] + self.gather(self.weight * b[self.pool] * g))
        y = theta[0] + power
        jacobian = np.zeros((len(y), self.size))
        jacobian[:, 0], jacobian[:, 1] = 1, power
        jacobian[:, 2] = -power * self.gather(self.weight * b[self.pool])
        np.add.at(jacobian, (self.point, SHARED + self.pool), power[self.point] * self.weight * g)
        np.add.at(
            jacobian, (self.point, SHARED + count + self.pool),
            power[self.point] * self.weight * b[self.pool] * slope,
        )  # fmt: skip
        return np.log(y), jacobian / y[:, None]

    def solve(
        self, start: Array, free: Mask, observed: Array | None = None, tolerance: float = 1e-12
    ) -> tuple[Array, float]:
        """The parameters near `start`, of which only the free ones move, and Huber's cost."""
        target = self.observed if observed is None else observed
        theta = start.copy()

        def filled(values: Array) -> Array:
            theta[free] = values
            return theta

        if not free.any():
            return theta, huber(self.predict(theta)[0] - target)
        found = least_squares(
            lambda values: self.predict(filled(values))[0] - target,
            np.clip(start[free], self.low[free], self.high[free]),
            jac=lambda values: self.predict(filled(values))[1][:, free],
            bounds=(self.low[free], self.high[free]), loss="huber", f_scale=DELTA, x_scale="jac",
            ftol=tolerance, xtol=tolerance, gtol=1e-14, max_nfev=300,
        )  # fmt: skip
        return filled(found.x).copy(), float(found.cost)

    def linear_start(self, E: float, log_ref: float, log_tau: Array) -> Array:
        """ln A and b by least squares on ln(L - E), for what is given."""
        count = len(self.names)
        g, _ = self.exposure(log_tau)
        matrix = np.zeros((len(self.observed), 1 + count))
        matrix[:, 0] = 1
        np.add.at(matrix, (self.point, 1 + self.pool), self.weight * (g - log_ref))
        found = np.linalg.lstsq(matrix, np.log(np.exp(self.observed) - E), rcond=None)[0]
        return np.clip(np.concatenate([[E], found[:1], [log_ref], found[1:], log_tau]), self.low, self.high)


def huber(residuals: Array) -> float:
    size = np.abs(residuals)
    return float(np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum())


def design(points: Sequence[Point], gamma: float) -> Design:
    names = tuple(dict.fromkeys(name for point in points for name in point.unique))
    rows: list[tuple[int, int, float, Array, Array]] = []
    for i, point in enumerate(points):
        total = math.fsum(point.unique.values())
        for name, share in point.shares.items():
            unique = point.unique[name]
            scale = (total / unique) ** gamma
            period = total if point.weights is None else unique / share
            edges, epochs = segments(point.tokens, [period], np.array([TAU_BOUNDS[1] * scale]))
            logs = np.log(edges[1:] / np.array([1.0, *edges[1:-1]]))
            rows.append((names.index(name), i, share, epochs[0] / scale, logs))
    pool, point_of, weight, repeats, logs = zip(*rows, strict=True)
    longest = max(map(len, logs))
    halvings, steps = (np.array([np.pad(row, (0, longest - len(row))) for row in table]) for table in (repeats, logs))
    losses, tokens = np.array([point.loss for point in points]), np.array([point.tokens for point in points])
    count = len(names)
    low = [
        0.0,
        -30.0,
        math.log(tokens.min() * REFERENCE_TOKENS),
        *[B_BOUNDS[0]] * count,
        *[math.log(TAU_BOUNDS[0])] * count,
    ]
    high = [
        LARGEST_E * losses.min(),
        30.0,
        math.log(tokens.max()),
        *[B_BOUNDS[1]] * count,
        *[math.log(TAU_BOUNDS[1])] * count,
    ]
    return Design(
        names, np.array(pool), np.array(point_of), np.array(weight), halvings, steps, np.log(losses),
        np.array(low), np.array(high),
    )  # fmt: skip
