"""Two laws of a model of N parameters that sees U unique tokens D / U times: what that is worth, and what it costs.

`DataConstrainedLaw` (arXiv 2305.16264): repeated tokens and excess parameters count for less and less; the loss never
rises. The constants are the published ones, of C4; below some 10^8 tokens they predict more than a uniform guess.

`OverfittingLaw` (arXiv 2605.01640) adds a penalty to the single-epoch law instead,

    L = E + A / N^alpha + B / D^beta + P R^delta (N / U)^kappa,    R = D / U - 1 repetitions

so the loss can rise. What is known of it is from its abstract and from Lilian Weng's survey of scaling laws (2026),
which prints this equation: P isolates overfitting, so settings are compared by P alone, and weight decay 1.0 has a P
about 70 % lower than the standard one. Not known: the fitted delta, kappa and P, and the weight decay that counts as
standard. They have no defaults here; `coefficient` finds P for exponents that are given.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from thriftlab.data.errors import DataError

FLOPS_PER_WEIGHT = 6  # of one token, forward and backward


def positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise DataError(f"{name} is {value}; it is a positive number")


@dataclass(frozen=True)
class DataConstrainedLaw:
    """R_D, R_N: how many repetitions, and how many times the fitting parameters, are worth something (1 - 1/e)."""

    E: float = math.exp(0.6254804)
    A: float = math.exp(6.255414)
    B: float = math.exp(7.3049974)
    alpha: float = 0.3526596
    beta: float = 0.3526596
    R_D: float = 15.387756
    R_N: float = 5.309743

    def loss(self, N: float, D: float, U: float) -> float:
        positive(N=N, D=D, U=U)
        unique = min(U, D)
        data = saturated(D, unique, self.R_D)
        parameters = saturated(N, min(N, self.fitting_parameters(unique)), self.R_N)
        return self.E + self.A / parameters**self.alpha + self.B / data**self.beta

    def fitting_parameters(self, U: float) -> float:
        """The compute-optimal N for U unique tokens seen once."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return (U * G) ** (self.beta / self.alpha) * G

    def compute_optimal(self, flops: float, U: float) -> tuple[float, float]:
        """(N, D) of the lowest loss with 6 N D = flops."""
        positive(flops=flops, U=U)
        weights = flops / FLOPS_PER_WEIGHT

        def loss(log_tokens: float) -> float:
            return self.loss(weights / math.exp(log_tokens), math.exp(log_tokens), U)

        grid = np.linspace(0, math.log(weights), 400)
        best = int(np.argmin([loss(x) for x in grid]))
        bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        tokens = math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)
        return weights / tokens, tokens


def saturated(amount: float, unique: float, constant: float) -> float:
    """What an amount is worth of which `unique` is new and the rest decays, by 1/e with `constant` repetitions."""
    return unique - unique * constant * math.expm1(-(amount / unique - 1) / constant)


@dataclass(frozen=True)
class OverfittingLaw:
    P: float
    delta: float
    kappa: float
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float, U: float) -> float:
        positive(N=N, D=D, U=U)
        return self.E + self.A / N**self.alpha + self.B / D**self.beta + self.P * self.shape(N, D, U)

    def shape(self, N: float, D: float, U: float) -> float:
        """The penalty for P = 1; none before the first repetition."""
        return max(D / U - 1, 0.0) ** self.delta * (N / U) ** self.kappa if D > U else 0.0

    def coefficient(self, runs: Iterable[tuple[float, float, float, float]]) -> float:
        """P by least squares over runs (N, D, U, loss), all else as it is in this law."""
        rows = [(self.shape(N, D, U), loss - self.loss(N, D, U)) for N, D, U, loss in runs]
        square = math.fsum(shape * shape for shape, _ in rows)
        if square == 0:
            raise DataError("no run repeats its data, so P is not identified; add runs with D above U")
        return self.P + math.fsum(shape * excess for shape, excess in rows) / square
