"""The utility law of data filtering (arXiv 2404.07177): the loss after n tokens of a pool, or of several mixed.

    d ln(y - E) / d ln n = sum_i w_i b_i (1/2)^(k_i / tau_i')
    k_i = floor(n w_i / P_i),    tau_i' = tau_i (N / P_i)^gamma

A pool of P_i unique tokens has a utility b_i < 0, which halves with every tau_i repetitions; w_i is its share of the
tokens and N the unique tokens of all pools in use. The slope is constant between the starts of epochs, so the integral
is a finite product; from (n / n_ref)^slope in the first epoch it gives y = E + A * product. With equal pools that is
the paper's theorem 1; unequal sizes and weights, and gamma, are ours: gamma = 1 is the theorem, and for language
models gamma = 0, since published runs do not show that tau grows with the pool. Two surprises of the reference code:
y(0) = E, and `quirk`, which adds E before the later epochs are multiplied, as that code does and the paper does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.errors import DataError

SAMPLES = 100_000  # the reference code's normaliser s
HALVINGS = 64  # after so many, what is left of a utility is below the precision of a float

Array = NDArray[np.float64]
Weights = Mapping[str, float]


@dataclass(frozen=True)
class Pool:
    """`tokens` are unique; `b` is the utility, `tau` its half-life in epochs."""

    name: str
    tokens: float
    b: float
    tau: float

    def __post_init__(self) -> None:
        if not 0 < self.tokens < math.inf:
            raise DataError(f"pool {self.name!r}: tokens is {self.tokens}; a pool has a positive number of them")
        if not -math.inf < self.b <= 0:
            raise DataError(f"pool {self.name!r}: b is {self.b}; a utility is negative, or 0 for useless data")
        if not self.tau > 0:
            raise DataError(f"pool {self.name!r}: tau is {self.tau}; a half-life is positive")


@dataclass(frozen=True)
class UtilityLaw:
    """Pools of one task, and what they share. `objective` effective_data lets data decay instead of its utility."""

    pools: tuple[Pool, ...]
    E: float = 0.0
    A: float = 1.0
    n_ref: float = 1.0
    gamma: float = 1.0
    objective: Literal["utility", "effective_data"] = "utility"
    quirk: bool = False

    def __post_init__(self) -> None:
        if not self.pools or len(self.named) < len(self.pools):
            raise DataError("a law takes one or more pools with names of their own")
        if not (self.A > 0 and self.n_ref > 0):
            raise DataError(f"A is {self.A} and n_ref is {self.n_ref}; both are positive")
        if self.objective not in ("utility", "effective_data"):
            raise DataError(f"unknown objective {self.objective!r}; use utility or effective_data")
        if self.quirk and self.objective != "utility":
            raise DataError("the quirk is one of the objective utility; leave it out with effective_data")

    @classmethod
    def reference(
        cls, b: float | Sequence[float], tau: float | Sequence[float], pool_size: float | Sequence[float],
        a: float, d: float = 0.0, s: float = SAMPLES, gamma: float = 1.0,
        objective: Literal["utility", "effective_data"] = "utility", quirk: bool = False,
    ) -> "UtilityLaw":  # fmt: skip
        """The law by the names of the reference code: pools "0", "1", ..., which all reach 1 + d at s / a samples."""
        rows = np.broadcast_arrays(*map(np.atleast_1d, (pool_size, b, tau)))
        pools = tuple(Pool(str(i), *map(float, row)) for i, row in enumerate(zip(*rows, strict=True)))
        return cls(pools, d, 1.0, s / a, gamma, objective, quirk)

    @classmethod
    def language_model(
        cls, pools: Sequence[Pool], E: float, A: float, n_ref: float, gamma: float = 0.0
    ) -> "UtilityLaw":
        """The law of held-out cross-entropy: all pools have the loss E + A at n_ref tokens."""
        return cls(tuple(pools), E, A, n_ref, gamma)

    @cached_property
    def named(self) -> dict[str, Pool]:
        return {pool.name: pool for pool in self.pools}

    @cached_property
    def ranked(self) -> list[Pool]:
        """Most useful first: by b; of equals the longer half-life, then the larger, then by name."""
        return sorted(self.pools, key=lambda pool: (pool.b, -pool.tau, -pool.tokens, pool.name))

    def shares(self, weights: Weights | None = None) -> Weights:
        """Weights that sum to 1, of the pools in use. None: all pools, each in proportion to its size."""
        given = {pool.name: pool.tokens for pool in self.pools} if weights is None else dict(weights)
        for name, weight in given.items():
            if name not in self.named:
                raise DataError(f"weight of {name!r}: the law has no such pool; it has {', '.join(self.named)}")
            if not 0 <= weight < math.inf:
                raise DataError(f"weight of {name!r} is {weight}; weights are not negative")
        total = math.fsum(given.values())
        if total == 0:
            raise DataError("all weights are 0; give one pool a positive weight")
        return {name: weight / total for name, weight in given.items() if weight > 0}

    def proportional(self, names: Sequence[str]) -> Weights:
        """The pools of these names mixed uniformly: each token is seen as often as any other."""
        return {name: self.named[name].tokens for name in names}

    def epochs(self, n: float, weights: Weights | None = None) -> dict[str, float]:
        """How often each pool in use is seen in n tokens."""
        return {name: n * share / self.named[name].tokens for name, share in self.shares(weights).items()}

    @overload
    def loss(self, n: float, weights: Weights | None = None) -> float: ...
    @overload
    def loss(self, n: Sequence[float] | Array, weights: Weights | None = None) -> Array: ...
    def loss(self, n: float | Sequence[float] | Array, weights: Weights | None = None) -> float | Array:
        """y after n tokens of the mixture; an array of them gives an array."""
        tokens = np.asarray(n, np.float64)
        if not (np.isfinite(tokens) & (tokens >= 0)).all():
            raise DataError(f"n is {n}; it is a number of tokens, 0 or more")
        found = np.array([self.at(float(one), weights) for one in tokens.ravel()])
        return float(found[0]) if tokens.ndim == 0 else found.reshape(tokens.shape)

    def at(self, n: float, weights: Weights | None = None) -> float:
        if n == 0:
            return self.E
        shares = self.shares(weights)
        used, w = [self.named[name] for name in shares], np.array(list(shares.values()))
        # The period of a pool is what is drawn in one of its epochs. In a uniform mixture it is N for all, exactly.
        total = math.fsum(pool.tokens for pool in used)
        periods = [total if weights is None else pool.tokens / shares[pool.name] for pool in used]
        half_lives = np.array([pool.tau * (total / pool.tokens) ** self.gamma for pool in used])
        edges, epochs = segments(n, periods, half_lives)
        decay = np.exp2(-epochs / half_lives[:, None])
        b = np.array([pool.b for pool in used])
        if self.objective == "utility":
            return self.of_utility(edges, (w * b) @ decay)
        return self.of_data(edges, w @ decay, (w * b) @ decay)

    def of_utility(self, edges: Array, slopes: Array) -> float:
        first, *later = slopes * np.log(edges[1:] / np.array([self.n_ref, *edges[1:-1]]))
        start, rest = self.A * math.exp(first), math.exp(math.fsum(later))
        return (self.E + start) * rest if self.quirk else self.E + start * rest

    def of_data(self, edges: Array, worth: Array, slopes: Array) -> float:
        """Every token adds what it is still worth to the effective data, which has the mean utility of its epoch."""
        data = np.cumsum(worth * np.diff(edges)) / self.n_ref
        return self.E + self.A * math.exp((slopes / worth) @ np.log(data / np.array([1.0, *data[:-1]])))

    def best_pool(self, n: float) -> "Choice":
        """The nested prefix of the ranked pools, mixed uniformly, with the lowest loss; of equals the smallest."""
        names = [pool.name for pool in self.ranked]
        losses = [self.at(n, self.proportional(names[: p + 1])) for p in range(len(names))]
        return Choice(tuple(names[: int(np.argmin(losses)) + 1]), tuple(names), tuple(losses))


@dataclass(frozen=True)
class Choice:
    """`losses[p - 1]` is that of the first p of `order`; `names` is the best of these prefixes."""

    names: tuple[str, ...]
    order: tuple[str, ...]
    losses: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.names)


def segments(n: float, periods: Sequence[float], half_lives: Array) -> tuple[Array, Array]:
    """[0, n] cut where a pool begins an epoch: edges [segments + 1], epoch of each pool [pools, segments]."""
    starts = []
    for period, tau in zip(periods, half_lives, strict=True):
        count = min(n // period, HALVINGS * tau + 1)
        begun = period * np.arange(1, math.floor(count) + 1)
        starts.append(begun[begun < n])
    edges = np.unique(np.concatenate([[0.0, n], *starts]))
    return edges, np.array([np.searchsorted(begun, edges[:-1], side="right") for begun in starts], np.float64)
