"""The utility law of language models fitted to finished runs, with what the runs do not identify.

Huber's loss (delta 1e-3) of ln L over all points, E and A and n_ref shared by the pools; many starts, then bounded
least squares. An interval is where the cost, minimised over all other parameters, stays below

    cost_min (1 + F / (n - p)),   F the 95 % quantile of F(1, n - p)

the profile-likelihood interval of Gaussian noise of unknown size; for larger residuals, which Huber's loss counts
linearly, it is wider than need be. A utility or half-life whose interval is wider than a factor of ten is not
identified; a half-life also needs five points of its pool, two of them with four epochs. A half-life that is not
identified is set to `PRIOR`. Intervals of predictions are those of refits to simulated runs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from thriftlab.data.errors import DataError
from thriftlab.data.law.design import SHARED, Design, Mask, design
from thriftlab.data.law.points import Point, before_the_rise
from thriftlab.data.law.utility import Array, Pool, UtilityLaw

LEVEL = 0.95
POINTS, REPEATED, EPOCHS = 5, 2, 4  # a half-life needs so many points, of which so many with so many epochs
PRIOR, PRIOR_RANGE = 13.0, (10.0, 17.0)  # half-life in epochs, of 182 published runs (arXiv 2305.16264) refitted
FLAT = 10.0
START_E = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of the lowest loss
START_TAU = (1.0, 3.0, 8.0, 20.0, 60.0)
START_REF = (1.0, 0.1, 1e-2, 1e-4)  # of the smallest n, where n_ref is fitted
STARTS = 8
PROFILE_TOLERANCE, DRAW_TOLERANCE = 1e-10, 1e-6  # of cost: a profile follows a narrow valley
HALVINGS = 6  # of the bracket of an interval's end
FLOOR = 1e-6  # of a residual: noiseless points have intervals of this order

Interval = tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """`draws` are laws that the points could as well have given; `missing` says why (pool, parameter) is not
    identified."""

    law: UtilityLaw
    points: tuple[Point, ...]
    excluded: tuple[Point, ...]
    intervals: Mapping[str, Mapping[str, Interval]]  # pool -> {"b", "tau"}; "" -> {"E", "A", "n_ref"}
    missing: Mapping[tuple[str, str], str]
    residual: float  # root mean square of ln L - ln y, for the degrees of freedom
    draws: tuple[UtilityLaw, ...]

    @property
    def last_epochs(self) -> dict[str, float]:
        """The most epochs of each pool in the fitted points; nothing is recommended beyond."""
        seen = [item for point in self.points for item in point.epochs.items()]
        return {name: max(epochs for pool, epochs in seen if pool == name) for name in self.law.named}

    @property
    def known(self) -> list[str]:
        """Pools with an identified utility."""
        return [name for name in self.law.named if (name, "b") not in self.missing]

    def predict(self, n: float, weights: Mapping[str, float] | None = None) -> tuple[float, Interval]:
        """The loss at n tokens, and its 95 % interval."""
        return self.law.loss(n, weights), interval_of([law.loss(n, weights) for law in self.draws])


def interval_of(values: Sequence[float] | Array) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="closest_observation")
    return float(low), float(high)


def fit(
    points: Sequence[Point],
    n_ref: float | str | None = None,
    gamma: float = 0.0,
    draws: int = 200,
    seed: int = 0,
) -> Fit:
    """Fit E, A and every pool's b and tau.

    Args:
        n_ref: tokens at which all pools have the same loss. None: the smallest n; "free": fitted.
        gamma: growth of half-lives with the mixture they are in, not fitted.
        draws: refits behind the intervals of predictions, from `seed`.
    """
    fitted, excluded = before_the_rise(points)
    if not fitted:
        raise DataError("not identified: there are no points; add finished runs")
    problem = design(fitted, gamma)
    missing = too_few(fitted, problem.names)
    log_ref = None if n_ref == "free" else math.log(min(p.tokens for p in fitted) if n_ref is None else float(n_ref))
    free = free_parameters(problem, missing, log_ref)
    theta, cost = search(problem, free, log_ref)
    intervals = profile(problem, theta, cost, free)
    flat = {key: why for key, why in flat_profiles(intervals).items() if key not in missing}
    if flat:
        missing = missing | flat
        free = free_parameters(problem, missing, log_ref)
        theta, cost = search(problem, free, log_ref)
        intervals = profile(problem, theta, cost, free)
    unique = {name: max(p.unique[name] for p in fitted if name in p.unique) for name in problem.names}
    degrees = len(fitted) - int(free.sum())
    rms = math.sqrt(float(((problem.observed - problem.predict(theta)[0]) ** 2).sum()) / degrees)
    laws = [law_of(problem, one, unique, gamma) for one in simulated(problem, theta, free, rms, draws, seed)]
    return Fit(
        law_of(problem, theta, unique, gamma), tuple(fitted), tuple(excluded), intervals, missing, rms, tuple(laws)
    )


def too_few(points: Sequence[Point], names: Sequence[str]) -> dict[tuple[str, str], str]:
    """What the number of points alone leaves open."""
    missing = {}
    for name in names:
        own = [point for point in points if name in point.unique]
        budgets = len({point.tokens for point in own})
        repeated = sum(point.epochs[name] >= EPOCHS for point in own)
        if budgets < 2:
            missing[name, "b"] = f"runs at {budgets} budget; at least 2 are needed"
        if len(own) < POINTS or repeated < REPEATED:
            missing[name, "tau"] = (
                f"{len(own)} runs, {repeated} of them with {EPOCHS} epochs or more; "
                f"at least {POINTS} are needed, {REPEATED} of them with {EPOCHS} epochs"
            )
    return missing


def flat_profiles(intervals: Mapping[str, Mapping[str, Interval]]) -> dict[tuple[str, str], str]:
    found = {}
    for name, own in intervals.items():
        for key in ("b", "tau"):
            low, high = sorted(map(abs, own.get(key, (1.0, 1.0))))
            if high >= FLAT * low:
                found[name, key] = f"the runs fit about as well for {key} from {low:.3g} to {high:.3g}"
    return found


def free_parameters(problem: Design, missing: Mapping[tuple[str, str], str], log_ref: float | None) -> Mask:
    """Which parameters are fitted. DataError if there are too few points for them."""
    free = np.ones(problem.size, bool)
    free[2] = log_ref is None and len(problem.names) > 1
    for i, name in enumerate(problem.names):
        free[problem.tau_at(i)] = (name, "tau") not in missing
    if len(problem.observed) <= free.sum():
        raise DataError(
            f"not identified: {len(problem.observed)} runs for {free.sum()} parameters (E, A, and b and tau of "
            f"{', '.join(problem.names)}); add runs at other budgets, two or more of a pool with {EPOCHS} epochs"
        )
    return free


def search(problem: Design, free: Mask, log_ref: float | None) -> tuple[Array, float]:
    """The best of many starts: a coarse grid of E, n_ref and tau, b and ln A by linear least squares."""
    lowest, smallest = math.exp(problem.observed.min()), problem.low[2] - math.log(1e-6)
    references = [log_ref] if log_ref is not None else [smallest + math.log(part) for part in START_REF]
    fixed_tau = ~free[problem.tau_at(0) :]
    starts = []
    for part, reference, tau in itertools.product(START_E, references, START_TAU):
        log_tau = np.where(fixed_tau, math.log(PRIOR), math.log(tau))
        starts.append(problem.linear_start(part * lowest, reference, log_tau))
    costs = [float(np.abs(problem.predict(start)[0] - problem.observed).sum()) for start in starts]
    nearest = [starts[i] for i in np.argsort(costs, kind="stable")[:STARTS]]
    return min((problem.solve(start, free) for start in nearest), key=lambda found: found[1])


def profile(problem: Design, theta: Array, cost: float, free: Mask) -> dict[str, dict[str, Interval]]:
    """The interval of every free parameter; E, A and n_ref under the name ""."""
    degrees = len(problem.observed) - int(free.sum())
    least = max(cost, len(problem.observed) * FLOOR**2 / 2)
    limit = least * (1 + stats.f.ppf(LEVEL, 1, degrees) / degrees)
    keys = [("", "E"), ("", "A"), ("", "n_ref")]
    keys += [(name, "b") for name in problem.names] + [(name, "tau") for name in problem.names]
    intervals: dict[str, dict[str, Interval]] = {name: {} for name, _ in keys}
    for j in np.flatnonzero(free):
        name, key = keys[j]
        ends = (end_of(problem, theta, free, int(j), float(bound[j]), limit) for bound in (problem.low, problem.high))
        low, high = ends if key in ("E", "b") else map(math.exp, ends)
        intervals[name][key] = low, high
    return intervals


def end_of(problem: Design, theta: Array, free: Mask, j: int, bound: float, limit: float) -> float:
    """Between the optimum and a bound: where the profile of parameter j crosses the limit, or the bound."""
    others = free.copy()
    others[j] = False
    best, reach = float(theta[j]), bound - float(theta[j])
    state = theta.copy()

    def excess(part: float) -> float:
        state[j] = best + part * reach
        state[:], cost = problem.solve(state, others, tolerance=PROFILE_TOLERANCE)
        return math.log(cost + 1e-300) - math.log(limit)

    if abs(reach) < 1e-9:
        return bound
    inner, outer = 0.0, 1e-4  # steps that grow, since the profile may be steep near the optimum
    while excess(outer) <= 0:
        if outer == 1:
            return bound
        inner, outer = outer, min(3 * outer, 1.0)
    for _ in range(HALVINGS):
        middle = (inner + outer) / 2
        inner, outer = (middle, outer) if excess(middle) <= 0 else (inner, middle)
    return best + reach * outer


def simulated(problem: Design, theta: Array, free: Mask, rms: float, draws: int, seed: int) -> list[Array]:
    """Refits to the fitted values with Gaussian noise, as wide as Student's t for the degrees of freedom.

    Noise, because residuals resampled are too small: Huber's loss lets a curve pass through as many points as it has
    parameters. A half-life that is not identified is drawn from the range of the prior.
    """
    generator = np.random.default_rng(seed)
    degrees = len(problem.observed) - int(free.sum())
    spread = rms * stats.t.ppf((1 + LEVEL) / 2, degrees) / stats.norm.ppf((1 + LEVEL) / 2)
    expected = problem.predict(theta)[0]
    fixed = [j for j in range(problem.tau_at(0), problem.size) if not free[j]]
    found = []
    for _ in range(draws):
        start = theta.copy()
        start[fixed] = np.log(generator.uniform(*PRIOR_RANGE, len(fixed)))
        observed = expected + generator.normal(0, spread, len(expected))
        found.append(problem.solve(start, free, observed, DRAW_TOLERANCE)[0])
    return found


def law_of(problem: Design, theta: Array, unique: Mapping[str, float], gamma: float) -> UtilityLaw:
    count = len(problem.names)
    b, tau = theta[SHARED : SHARED + count], np.exp(theta[SHARED + count :])
    pools = [Pool(name, unique[name], float(b[i]), float(tau[i])) for i, name in enumerate(problem.names)]
    return UtilityLaw.language_model(pools, float(theta[0]), math.exp(theta[1]), math.exp(theta[2]), gamma)
