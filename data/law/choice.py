"""Which data to train on: the best mixture for a budget, how sure that is, and where the best one changes.

Candidates are compared by the draws of a fit, pair by pair: a better one is told apart where the 95 % interval of the
difference leaves out 0 and the predicted gap is larger than the error of the fit. A candidate that repeats a pool more
often than any fitted run did is not recommended, since the law cannot say where the loss begins to rise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thriftlab.data.errors import DataError
from thriftlab.data.law.fit import Fit, Interval, interval_of
from thriftlab.data.law.points import Point
from thriftlab.data.law.utility import Array, UtilityLaw, Weights

STEPS = 100  # of a weight
GRID = 120  # budgets between the ends, where a change of the best is looked for
AWAY = 1.1  # from n_ref
SLACK = 1 + 1e-9  # of the last fitted number of epochs
GAMMAS = np.linspace(0, 1, 21)

Candidates = Mapping[str, Weights]


@dataclass(frozen=True)
class Option:
    """One candidate at one budget. `beyond` names the pool that it would repeat more often than any fitted run."""

    name: str
    weights: Weights
    loss: float
    interval: Interval
    epochs: Mapping[str, float]
    beyond: str | None


@dataclass(frozen=True)
class Answer:
    """`options` by predicted loss. `best` is None where all are beyond the fitted epochs; `tied` are the candidates
    that cannot be told apart from it."""

    tokens: float
    options: tuple[Option, ...]
    best: Option | None
    tied: tuple[str, ...]


@dataclass(frozen=True)
class Crossover:
    """At `tokens` the best candidate changes; an end of the interval is 0 or inf where draws change outside of it."""

    tokens: float
    interval: Interval
    before: str
    after: str


def prefixes(fit: Fit) -> dict[str, Weights]:
    """The nested prefixes of the pools whose utility is identified, most useful first, mixed uniformly."""
    names = [pool.name for pool in fit.law.ranked if pool.name in fit.known]
    return {" + ".join(names[:p]): fit.law.proportional(names[:p]) for p in range(1, len(names) + 1)}


def answer(fit: Fit, tokens: float, candidates: Candidates | None = None) -> Answer:
    """The best candidate for a budget in tokens; None: the nested prefixes."""
    given = prefixes(fit) if candidates is None else candidates
    if not given:
        raise DataError(f"not identified: no pool has a utility; {'; '.join(fit.missing.values())}")
    options = sorted((option(fit, tokens, *item) for item in given.items()), key=lambda found: found.loss)
    best = next((found for found in options if found.beyond is None), None)
    rivals = [found for found in options if found.beyond is None and found is not best]
    tied = tuple(rival.name for rival in rivals if best and not told_apart(fit, tokens, best, rival))
    return Answer(tokens, tuple(options), best, tied)


def option(fit: Fit, tokens: float, name: str, weights: Weights) -> Option:
    loss, interval = fit.predict(tokens, weights)
    epochs, last = fit.law.epochs(tokens, weights), fit.last_epochs
    beyond = next((pool for pool, count in epochs.items() if count > SLACK * max(last[pool], 1)), None)
    return Option(name, weights, loss, interval, epochs, beyond)


def told_apart(fit: Fit, tokens: float, better: Option, worse: Option) -> bool:
    gaps = [law.loss(tokens, worse.weights) - law.loss(tokens, better.weights) for law in fit.draws]
    return worse.loss - better.loss > fit.residual * better.loss and interval_of(gaps)[0] > 0


def crossovers(fit: Fit, low: float, high: float, candidates: Candidates | None = None) -> list[Crossover]:
    """Where between two budgets the candidate with the lowest predicted loss changes.

    Not below n_ref, where all pools have the same loss and their order is turned round.
    """
    given = prefixes(fit) if candidates is None else candidates
    low = max(low, AWAY * fit.law.n_ref)
    if len(given) < 2 or low >= high:
        return []
    grid = np.geomspace(low, high, GRID)
    names = list(given)
    best = np.array([fit.law.loss(grid, given[name]) for name in names]).argmin(0)
    found = []
    for i in np.flatnonzero(best[1:] != best[:-1]):
        before, after = names[best[i]], names[best[i + 1]]
        tokens = crossing(fit.law, grid, given[before], given[after], grid[i])
        drawn = [crossing(law, grid, given[before], given[after], tokens) for law in fit.draws]
        found.append(Crossover(tokens, interval_of(drawn), before, after))
    return found


def crossing(law: UtilityLaw, grid: Array, before: Weights, after: Weights, near: float) -> float:
    """The n nearest to `near` from which on `after` is the better one; 0 or inf if there is none on the grid."""
    gaps = law.loss(grid, after) - law.loss(grid, before)
    changes = np.flatnonzero((gaps[:-1] >= 0) & (gaps[1:] < 0))
    if not len(changes):
        return 0.0 if law.at(near, after) < law.at(near, before) else math.inf
    i = changes[np.abs(np.log(grid[changes] / near)).argmin()]
    inner, outer = float(grid[i]), float(grid[i + 1])
    while outer > inner * (1 + 1e-9):
        middle = math.sqrt(inner * outer)
        better = law.at(middle, after) < law.at(middle, before)
        inner, outer = (inner, middle) if better else (middle, outer)
    return outer


def best_weights(law: UtilityLaw, tokens: float, last_epochs: Mapping[str, float] | None = None) -> dict[str, float]:
    """The weights, in steps of a hundredth, with the lowest loss, no pool beyond its last epochs.

    For pools that are all in use the exponent is a sum over pools of functions of their own weight, so a search over
    pools, one after the other, is complete. With gamma the half-lives depend on which pools are in use; then these are
    the nested prefixes. DataError where the cap leaves no weights.
    """
    if law.objective != "utility" or law.quirk:
        raise DataError("weights are searched for the objective utility without the quirk")
    ranked = [pool.name for pool in law.ranked]
    used = [ranked[: p + 1] for p in range(len(ranked))] if law.gamma else [ranked]
    caps = {name: (last_epochs or {}).get(name, math.inf) for name in ranked}
    found = [weights for names in used if (weights := divide(law, tokens, names, caps))]
    if not found:
        raise DataError(f"{tokens:,.0f} tokens repeat every pool more often than the fitted runs; add data or runs")
    return min(found, key=lambda weights: law.at(tokens, weights))


def divide(law: UtilityLaw, tokens: float, names: Sequence[str], caps: Mapping[str, float]) -> dict[str, float] | None:
    """The best division of STEPS among these pools, each with one step or more if gamma is not 0."""
    total = math.fsum(law.named[name].tokens for name in names)
    least = int(law.gamma != 0)
    cost, chosen = np.full(STEPS + 1, np.inf), []
    cost[0] = 0
    for name in names:
        pool = law.named[name]
        half_life = pool.tau * (total / pool.tokens) ** law.gamma
        own = np.full(STEPS + 1, np.inf)
        for k in range(least, STEPS + 1):
            share = k / STEPS
            if share * tokens <= SLACK * caps[name] * pool.tokens:
                own[k] = exponent(law, tokens, share, pool.tokens, pool.b, half_life)
        table = np.array(
            [[cost[k - j] + own[j] if j <= k else np.inf for j in range(STEPS + 1)] for k in range(STEPS + 1)]
        )
        chosen.append(table.argmin(1))
        cost = table.min(1)
    if not np.isfinite(cost[STEPS]):
        return None
    left, weights = STEPS, {}
    for name, steps in zip(reversed(names), reversed(chosen), strict=True):
        weights[name] = int(steps[left]) / STEPS
        left -= int(steps[left])
    return {name: weights[name] for name in names if weights[name] > 0}


def exponent(law: UtilityLaw, tokens: float, share: float, unique: float, b: float, half_life: float) -> float:
    """What a pool with this share adds to ln((y - E) / A)."""
    if share == 0 or b == 0:
        return 0.0
    alone = UtilityLaw.reference(b, half_life, unique / share, 1.0, s=law.n_ref)
    return share * math.log(alone.at(tokens))


def calibrated_gamma(fit: Fit, mixtures: Sequence[Point]) -> float:
    """gamma in 0, 0.05, ..., 1 with which the fitted pools predict runs of mixtures best; of equals the smallest."""
    return float(min(GAMMAS, key=lambda gamma: mixture_error(replace(fit.law, gamma=float(gamma)), mixtures)))


def mixture_error(law: UtilityLaw, mixtures: Sequence[Point]) -> float:
    """Root mean square of ln L - ln y over runs of mixtures."""
    return math.sqrt(float(np.mean([(math.log(p.loss) - math.log(predicted(law, p))) ** 2 for p in mixtures])))


def predicted(law: UtilityLaw, point: Point) -> float:
    """y of a run, with the unique tokens that it had."""
    pools = tuple(replace(law.named[name], tokens=unique) for name, unique in point.unique.items())
    return replace(law, pools=pools).at(point.tokens, point.weights)


def with_gamma(fit: Fit, gamma: float) -> Fit:
    return replace(fit, law=replace(fit.law, gamma=gamma), draws=tuple(replace(law, gamma=gamma) for law in fit.draws))
