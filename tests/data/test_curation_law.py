"""The utility law against slow references written from its equations: direct products, and the slope integrated."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.data.curation_law import (
    DataConstrainedLaw,
    OverfittingLaw,
    Point,
    Pool,
    UtilityLaw,
    answer,
    before_the_rise,
    best_weights,
    calibrated_gamma,
    crossovers,
    fit,
    fit_grid,
    mixture_error,
    prefixes,
    with_gamma,
)
from thriftlab.data.errors import DataError
from thriftlab.data.law.choice import crossing

EXACT = 1e-9
P, A, D, S = 12.8e6, 0.022, 0.1, 100_000
TMARS = {"b": [-0.165, -0.150, -0.131, -0.115], "tau": [2, 2.6, 3, 4]}
MILLIONS = [12.8, 25.6, 32, 64, 128, 256, 640, 1280, 2560]
M = 1e6


# --------------------------------------------------------------------------------------------------------- references


def product(n, size, slopes, a=A, s=S, d=D, quirk=False):
    """1.1 and 1.2 as printed: epochs of `size`, the exponent of epoch k is slopes(k)."""
    if n == 0:
        return d
    last = math.floor(n / size)
    ends = [min((k + 1) * size, n) for k in range(last + 1)]
    start, rest = (a * ends[0] / s) ** slopes(0), 1.0
    for k in range(1, last + 1):
        rest *= (ends[k] / ends[k - 1]) ** slopes(k)
    return (d + start) * rest if quirk else start * rest + d


def one_pool(n, b, tau, size=P, **given):
    return product(n, size, lambda k: b * 0.5 ** (k / tau), **given)


def equal_pools(n, b, tau, size=P, **given):
    count = len(b)
    slopes = lambda k: sum(x * 0.5 ** (k / (count * t)) for x, t in zip(b, tau, strict=True)) / count  # noqa: E731
    return product(n, count * size, slopes, **given)


def effective(n, b, tau, size=P, a=A, s=S, d=D):
    """1.2's other objective: every epoch adds the mean decay of its samples."""
    count, data, y = len(b), 0.0, 1.0
    total = count * size
    for k in range(math.floor(n / total) + 1):
        decay = [0.5 ** (k / (count * t)) for t in tau]
        new = data + a / s * (min((k + 1) * total, n) - k * total) * sum(decay) / count
        slope = sum(x * q for x, q in zip(b, decay, strict=True)) / sum(decay)
        y *= new**slope if k == 0 else (new / data) ** slope
        data = new
    return y + d


def integrated(n, pools, weights, E, A, n_ref, gamma):
    """The differential form between sorted breakpoints, which are exact fractions. pools: (unique, b, tau)."""
    total, share = sum(Fraction(u) for u, *_ in pools), [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    used = [(Fraction(u), b, t, w) for (u, b, t), w in zip(pools, share, strict=True) if w]
    total = sum(u for u, *_ in used)
    n = Fraction(n)
    breaks = {j * u / w for u, _, _, w in used for j in range(1, int(n * w / u) + 1)}
    edges = [*sorted(x for x in breaks if x < n), n]
    log_u, before = 0.0, None
    for edge in edges:
        inside = edge / 2 if before is None else (before + edge) / 2
        slope = sum(
            float(w) * b * 0.5 ** (math.floor(inside * w / u) / (t * float(total / u) ** gamma)) for u, b, t, w in used
        )
        log_u += slope * (math.log(edge / Fraction(n_ref)) if before is None else math.log(edge / before))
        before = edge
    return E + A * math.exp(log_u)


def tasks():
    n, b, tau = st.floats(0.05, 60), st.floats(-0.5, -0.005), st.floats(0.5, 100)
    return st.tuples(n, st.lists(st.tuples(st.floats(0.3, 9), b, tau), min_size=1, max_size=4))


# ---------------------------------------------------------------------------------------------------------- one pool


@pytest.mark.parametrize("multiple", [0, 0.3, 1, 1.5, 2, 3, 9.999999, 10, 10.000001, 50])
@pytest.mark.parametrize("b, tau", [(-0.13106, 3), (-0.5, 1), (-0.005, 100)])
@pytest.mark.parametrize("quirk", [False, True])
def test_one_pool_is_the_printed_product(multiple, b, tau, quirk):
    law = UtilityLaw.reference(b, tau, P, A, D, quirk=quirk)
    assert law.loss(multiple * P) == pytest.approx(one_pool(multiple * P, b, tau, quirk=quirk), rel=EXACT)


def test_one_pool_is_the_slope_integrated():
    """d ln(y - d) / d ln n = b delta^floor(n / P), in a million steps of ln n from the end of the first epoch."""
    b, tau, last = -0.13106, 3, 7.3
    x = np.linspace(0, math.log(last), 1_000_001)
    middle = np.exp((x[1:] + x[:-1]) / 2)
    log_y = math.log((A * P / S) ** b) + float((b * 0.5 ** (np.floor(middle) / tau) * np.diff(x)).sum())
    assert UtilityLaw.reference(b, tau, P, A, D).loss(last * P) == pytest.approx(D + math.exp(log_y), rel=1e-6)


def test_all_pools_cross_at_s_over_a():
    law = UtilityLaw.reference(TMARS["b"], TMARS["tau"], P, A, D)
    losses = [law.loss(S / A, {pool.name: 1}) for pool in law.pools]
    assert losses == [pytest.approx(1 + D, rel=EXACT)] * 4 and S / A == pytest.approx(4.545e6, rel=1e-3)


def test_an_exact_multiple_has_a_last_factor_of_one():
    law = UtilityLaw.reference(-0.13, 3, P, A, D)
    for k in range(1, 20):
        near = law.loss(np.nextafter(k * P, np.array([0, math.inf])))
        assert near == pytest.approx([law.loss(k * P)] * 2, rel=1e-14)


def test_no_samples_give_d_and_arrays_give_arrays():
    law = UtilityLaw.reference(-0.13, 3, P, A, D)
    assert law.loss(0) == D and UtilityLaw.reference(-0.13, 3, P, A, D, quirk=True).loss(0) == D
    assert UtilityLaw.reference(-0.13, 3, P, A, D, objective="effective_data").loss(0) == D
    grid = np.array([[0, P], [2 * P, 3.5 * P]])
    assert law.loss(grid).shape == (2, 2) and law.loss(grid)[1, 1] == law.loss(3.5 * P)


def test_an_endless_run_costs_no_more_than_its_half_lives():
    law = UtilityLaw.reference(-0.13, 3, 1, A, D)
    assert law.loss(1e15) == pytest.approx(law.loss(1e12), rel=EXACT)
    assert law.loss(1e15) == pytest.approx(one_pool(20_000, -0.13, 3, 1), rel=EXACT)


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf])
def test_what_is_no_number_of_samples_is_refused(wrong):
    with pytest.raises(DataError, match="n is"):
        UtilityLaw.reference(-0.13, 3, P, A, D).loss(wrong)


@pytest.mark.parametrize(
    "given, words",
    [({"b": 0.1}, "b is 0.1"), ({"tau": 0}, "tau is 0"), ({"pool_size": 0}, "tokens is 0"), ({"a": -1}, "n_ref is"),
     ({"objective": "data"}, "unknown objective"), ({"objective": "effective_data", "quirk": True}, "quirk")],
)  # fmt: skip
def test_impossible_laws_are_refused(given, words):
    with pytest.raises(DataError, match=words):
        UtilityLaw.reference(**{"b": -0.1, "tau": 3, "pool_size": P, "a": A, **given})


# ----------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("millions", [1, *MILLIONS, 38.4, 51.2])
@pytest.mark.parametrize("quirk", [False, True])
def test_equal_pools_are_theorem_1(millions, quirk):
    law = UtilityLaw.reference(**TMARS, pool_size=P, a=A, d=D, quirk=quirk)
    expected = equal_pools(millions * M, **TMARS, quirk=quirk)
    assert law.loss(millions * M) == pytest.approx(expected, rel=EXACT)
    equal = dict.fromkeys("0123", 1 / 4)
    assert law.loss(millions * M, equal) == pytest.approx(expected, rel=EXACT)
    assert law.loss(millions * M, dict.fromkeys("0123", 7)) == law.loss(millions * M, equal)


@pytest.mark.parametrize("millions", [1, *MILLIONS])
def test_effective_data(millions):
    law = UtilityLaw.reference(**TMARS, pool_size=P, a=A, d=D, objective="effective_data")
    assert law.loss(millions * M) == pytest.approx(effective(millions * M, **TMARS), rel=EXACT)
    one = UtilityLaw.reference(-0.13, 3, P, A, D, objective="effective_data")
    data = sum(A / S * max(min(millions * M - k * P, P), 0) * 0.5 ** (k / 3) for k in range(300))
    assert one.loss(millions * M) == pytest.approx(data**-0.13 + D, rel=EXACT)


@given(tasks(), st.floats(0, 1), st.data())
@settings(max_examples=150, deadline=None)
def test_any_sizes_weights_and_budgets_are_the_slope_integrated(task, gamma, data):
    n, pools = task
    weights = data.draw(st.lists(st.floats(0.01, 1), min_size=len(pools), max_size=len(pools)))
    law = UtilityLaw(tuple(Pool(str(i), *pool) for i, pool in enumerate(pools)), 1.5, 2.0, 0.7, gamma)
    expected = integrated(n, pools, weights, 1.5, 2.0, 0.7, gamma)
    assert law.loss(n, {str(i): w for i, w in enumerate(weights)}) == pytest.approx(expected, rel=EXACT)
    sizes = [unique for unique, *_ in pools]
    assert law.loss(n) == pytest.approx(integrated(n, pools, sizes, 1.5, 2.0, 0.7, gamma), rel=EXACT)


@given(tasks(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_of_pools_does_not_matter(task, random):
    n, pools = task
    named = [Pool(str(i), *pool) for i, pool in enumerate(pools)]
    shuffled = random.sample(named, len(named))
    one, other = UtilityLaw(tuple(named)).best_pool(n), UtilityLaw(tuple(shuffled)).best_pool(n)
    assert (one.order, one.names) == (other.order, other.names)
    assert UtilityLaw(tuple(named)).loss(n) == pytest.approx(UtilityLaw(tuple(shuffled)).loss(n), rel=1e-13)


@given(tasks())
@settings(max_examples=60, deadline=None)
def test_a_pool_without_weight_is_not_in_use(task):
    n, pools = task
    law = UtilityLaw((Pool("other", 5.0, -0.4, 9.0), *(Pool(str(i), *pool) for i, pool in enumerate(pools))))
    weights = {str(i): 1.0 for i in range(len(pools))}
    assert law.loss(n, {"other": 0.0, **weights}) == law.loss(n, weights)
    assert law.loss(n, weights) == UtilityLaw(law.pools[1:]).loss(n, weights)


def test_weights_that_mean_nothing_are_refused():
    law = UtilityLaw.reference(**TMARS, pool_size=P, a=A)
    for weights, words in (({"9": 1}, "no such pool"), ({"0": -1}, "not negative"), ({"0": 0}, "all weights are 0")):
        with pytest.raises(DataError, match=words):
            law.loss(P, weights)
    assert law.epochs(2 * P, {"0": 1, "1": 3}) == {"0": 0.5, "1": 1.5}


# ------------------------------------------------------------------------------------------------------------ choice


def test_the_worked_example():
    counts = [UtilityLaw.reference(**TMARS, pool_size=P, a=A, d=D).best_pool(n * M).count for n in MILLIONS]
    assert counts == [1, 2, 2, 2, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("n", [0.5 * M, *(n * M for n in MILLIONS)])
@pytest.mark.parametrize("objective", ["utility", "effective_data", "quirk"])
def test_best_pool_tries_the_nested_prefixes(n, objective):
    order = [2, 0, 3, 1]
    given = {key: [values[i] for i in order] for key, values in TMARS.items()}
    quirk = objective == "quirk"
    law = UtilityLaw.reference(**given, pool_size=P, a=A, d=D, objective="utility" if quirk else objective, quirk=quirk)
    found = law.best_pool(n)
    slow = {"effective_data": effective, "utility": equal_pools, "quirk": lambda *a: equal_pools(*a, quirk=True)}
    losses = [slow[objective](n, TMARS["b"][:p], TMARS["tau"][:p]) for p in (1, 2, 3, 4)]
    assert found.losses == pytest.approx(losses, rel=EXACT)
    assert found.count == int(np.argmin(losses)) + 1 and found.order == ("1", "3", "0", "2")


def test_ties_go_to_the_smallest_prefix_and_of_equal_pools_to_the_longest_half_life():
    """With d alone left, all prefixes are the same at n = 0; at s / a they all are 1 + d but for rounding."""
    law = UtilityLaw.reference([-0.1, -0.1, -0.1], [2, 5, 5], [P, P, 2 * P], A, D)
    assert law.best_pool(0).count == 1
    assert law.best_pool(P).order == ("2", "1", "0")


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_best_weights_beat_every_division_by_twentieths(gamma):
    pools = (Pool("a", 1.0, -0.3, 3.0), Pool("b", 4.0, -0.2, 5.0), Pool("c", 2.0, -0.1, 9.0))
    law = UtilityLaw(pools, 1.0, 2.0, 0.5, gamma)
    for n in (0.5, 3.0, 12.0, 60.0):
        weights = best_weights(law, n)
        assert sum(weights.values()) == pytest.approx(1) and all(w > 0 for w in weights.values())
        tried = [{"a": i, "b": j, "c": 20 - i - j} for i in range(21) for j in range(21 - i)]
        if gamma:  # then only nested prefixes are searched
            tried = [w for w in tried if w["a"] and (w["b"] or not w["c"])]
        assert law.loss(n, weights) <= min(law.loss(n, w) for w in tried) + 1e-12


def test_best_weights_keep_within_the_fitted_epochs():
    law = UtilityLaw((Pool("a", 1.0, -0.3, 9.0), Pool("b", 9.0, -0.2, 9.0)), gamma=0.0)
    last = {"a": 2.0, "b": 1.0}
    weights = best_weights(law, 8.0, last)
    assert weights["a"] == 0.25 and all(law.epochs(8.0, weights)[name] <= last[name] + 1e-9 for name in weights)
    with pytest.raises(DataError, match="repeat every pool"):
        best_weights(law, 30.0, last)


# -------------------------------------------------------------------------------------------------- laws of repetition


def test_the_published_checks_of_the_data_constrained_law():
    law = DataConstrainedLaw()
    assert law.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=EXACT)
    assert law.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=EXACT)
    N, tokens = law.compute_optimal(1e22, 25e9)
    assert (N, tokens) == (pytest.approx(7.022e9, rel=1e-3), pytest.approx(237.34e9, rel=1e-3))
    assert 6 * N * tokens == pytest.approx(1e22, rel=1e-12)
    others = [law.loss(N * x, tokens / x, 25e9) for x in (0.98, 0.999, 1.001, 1.02)]
    assert law.loss(N, tokens, 25e9) <= min(others)


def test_what_repeated_data_are_worth():
    """D' / U of data_signals 3.4: 1, 1.968, 3.726, 6.62, 10.58, 15.17, 16.39 for 1, 2, 4, 8, 16, 40 and all epochs."""
    law, E, A, B, beta = DataConstrainedLaw(), math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596
    for epochs, worth in ((1, 1), (2, 1.968), (4, 3.726), (8, 6.62), (16, 10.58), (40, 15.17), (1e9, 16.39)):
        data = ((law.loss(1e3, epochs * 1e9, 1e9) - E - A / 1e3**beta) / B) ** (-1 / beta)
        assert data / 1e9 == pytest.approx(worth, rel=1e-3)
    assert law.loss(1e3, 1e8, 1e9) == pytest.approx(law.loss(1e3, 1e8, 1e8), rel=EXACT)  # not all of it is seen


def test_the_overfitting_penalty_is_added_from_the_first_repetition_on():
    base = {"E": 1.8, "A": 500.0, "B": 1500.0, "alpha": 0.35, "beta": 0.36}
    law = OverfittingLaw(P=0.02, delta=1.3, kappa=0.6, **base)
    plain = lambda N, D: 1.8 + 500 / N**0.35 + 1500 / D**0.36  # noqa: E731
    assert law.loss(1e8, 1e9, 1e9) == law.loss(1e8, 1e9, 5e9) == pytest.approx(plain(1e8, 1e9), rel=EXACT)
    assert law.loss(1e8, 5e9, 1e9) == pytest.approx(plain(1e8, 5e9) + 0.02 * 4**1.3 * 0.1**0.6, rel=EXACT)
    assert min(range(1, 60), key=lambda k: law.loss(1e8, k * 1e8, 1e8)) in range(2, 58)  # the loss rises in the end
    strong = OverfittingLaw(P=0.006, delta=1.3, kappa=0.6, **base)
    runs = [(N, D, 1e9, strong.loss(N, D, 1e9)) for N in (1e8, 1e9) for D in (1e9, 3e9, 9e9)]
    assert law.coefficient(runs) == pytest.approx(0.006, rel=1e-6)
    with pytest.raises(DataError, match="not identified"):
        law.coefficient(runs[:1])


# ------------------------------------------------------------------------------------------------------- the grid fit


def grid_points(b, tau, a=A, d=D, name="pool"):
    return [Point(k * P, one_pool(k * P, b, tau, a=a, d=d), {name: P}) for k in (2, 4, 6, 8, 10)]


def test_the_grid_finds_its_own_point():
    b, tau = np.linspace(-0.005, -0.5, 100)[25], np.linspace(1, 10, 100)[22]
    found = fit_grid(grid_points(b, tau), a=A, d=D)
    (pool,) = found.law.pools
    assert (pool.b, pool.tau) == (b, tau) and found.sse < 1e-25
    assert fit_grid(grid_points(b, tau), a=A, d=D) == found


def test_the_grid_shares_a_and_d():
    points = grid_points(-0.13, 3, 0.025, 0.02) + grid_points(-0.2, 5, 0.025, 0.02, "other")
    found = fit_grid(points)
    assert (
        found.a == 0.025 and found.d == pytest.approx(0.02) and [p.name for p in found.law.pools] == ["pool", "other"]
    )
    assert found.law.loss(30 * P, {"pool": 1}) == pytest.approx(one_pool(30 * P, -0.13, 3, a=0.025, d=0.02), rel=3e-3)


def test_the_grid_is_complete():
    """Every point of it against a plain loop, errors of the quirk included."""
    points = [Point(k * P, 0.7 + 0.05 / k, {"pool": P}) for k in (2, 5, 9)]
    for quirk in (False, True):
        found = fit_grid(points, a=A, d=D, quirk=quirk)
        errors = [
            sum((one_pool(p.tokens, b, tau, quirk=quirk) - p.loss) ** 2 for p in points)
            for b in np.linspace(-0.005, -0.5, 100)
            for tau in np.linspace(1, 10, 100)[::9]
        ]
        assert found.sse <= min(errors) + 1e-15
        (pool,) = found.law.pools
        refound = sum((one_pool(p.tokens, pool.b, pool.tau, quirk=quirk) - p.loss) ** 2 for p in points)
        assert refound == pytest.approx(found.sse, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- the fit

TRUTH = UtilityLaw.language_model(
    [Pool("a", 1 * M, -0.22, 5.0), Pool("b", 2 * M, -0.17, 9.0), Pool("c", 4 * M, -0.13, 14.0)], 2.0, 3.0, 1 * M
)
BUDGETS = [1 * M, 2 * M, 4 * M, 8 * M, 16 * M, 32 * M]


def runs(law=TRUTH, budgets=BUDGETS, noise=0.0, seeds=1, seed=0, names=None):
    random = np.random.default_rng(seed)
    return [
        Point(
            n, law.loss(n, {pool.name: 1}) * math.exp(random.normal(0, noise) if noise else 0), {pool.name: pool.tokens}
        )
        for pool in law.pools
        if names is None or pool.name in names
        for n in budgets
        for _ in range(seeds)
    ]


def test_noiseless_runs_give_the_planted_parameters():
    found = fit(runs(), draws=5)
    assert not found.missing and not found.excluded and found.residual < 1e-9
    for pool in found.law.pools:
        true = TRUTH.named[pool.name]
        assert (pool.b, pool.tau) == (pytest.approx(true.b, rel=1e-6), pytest.approx(true.tau, rel=1e-6))
        low, high = found.intervals[pool.name]["tau"]
        assert low <= pool.tau <= high < 1.01 * low
    assert (found.law.E, found.law.A) == (pytest.approx(2, rel=1e-6), pytest.approx(3, rel=1e-6))
    for n in (64 * M, 1e9):
        for weights in ({"a": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 1, "c": 7}):
            assert found.predict(n, weights)[0] == pytest.approx(TRUTH.loss(n, weights), rel=1e-8)


def test_noiseless_runs_give_a_free_n_ref():
    law = UtilityLaw.language_model(TRUTH.pools, 2.0, 6.0, 0.05 * M)
    found = fit(runs(law), n_ref="free", draws=5)
    assert found.law.n_ref == pytest.approx(0.05 * M, rel=1e-4) and found.law.A == pytest.approx(6, rel=1e-4)


def test_mixtures_are_fitted_with_the_pools():
    mixed = [{"a": 1 * M, "b": 2 * M}, {"b": 2 * M, "c": 4 * M}]
    points = runs(names=["a", "c"]) + [
        Point(n, TRUTH.loss(n, weights), weights) for n in BUDGETS for weights in mixed
    ] + [Point(n, TRUTH.loss(n, {"a": 1, "b": 1}), mixed[0], {"a": 1, "b": 1}) for n in BUDGETS]  # fmt: skip
    found = fit(points, draws=5)
    assert {p.name: (p.b, p.tau) for p in found.law.pools} == {
        p.name: (pytest.approx(p.b, rel=1e-5), pytest.approx(p.tau, rel=1e-4)) for p in TRUTH.pools
    }


@pytest.mark.slow
def test_the_same_runs_and_seed_give_the_same_fit():
    points = runs(noise=1e-4, names=["a"])
    one, again, other = (fit(points, draws=2, seed=seed) for seed in (3, 3, 4))
    assert one == again and one.law == other.law and one.draws != other.draws


@pytest.mark.slow
def test_noisy_runs_give_intervals_that_cover():
    """Nominal 95 %, in 4 fits of 12 noisy points: the parameters, and a prediction beyond the data."""
    inside, pool, wanted = [], TRUTH.named["a"], TRUTH.loss(100 * M, {"a": 1})
    for seed in range(4):
        found = fit(runs(noise=1e-3, seed=seed, names=["a"], seeds=2), draws=40)
        own = found.intervals["a"] | found.intervals[""] | {"loss": found.predict(100 * M)[1]}
        true = {"b": pool.b, "tau": pool.tau, "E": 2.0, "A": 3.0, "loss": wanted}
        inside += [own[key][0] <= true[key] <= own[key][1] for key in own]
    assert len(inside) == 20 and sum(inside) >= 17


def test_points_past_a_minimum_are_left_out():
    points = runs(names=["a"], budgets=[*BUDGETS, 64 * M, 128 * M])
    risen = [Point(p.tokens, p.loss + 0.3 * (p.tokens >= 64 * M), p.unique) for p in points]
    fitted, excluded = before_the_rise(risen)
    assert [p.tokens for p in excluded] == [64 * M, 128 * M] and fitted == risen[:6]
    found = fit(risen, draws=5)
    assert found.last_epochs == {"a": 32.0} and found.law.named["a"].tau == pytest.approx(5, rel=1e-5)


def test_a_loss_that_rises_without_repetition_is_not_left_out():
    points = [Point(n, loss, {"a": 100.0}) for n, loss in ((10, 3.0), (20, 3.2), (50, 2.9), (200, 2.5), (400, 2.6))]
    assert [p.tokens for p in before_the_rise(points)[1]] == [400]


def test_noise_of_seeds_is_no_rise():
    losses = {10: (3.00, 3.10), 200: (2.50, 2.60), 400: (2.53, 2.63)}
    points = [Point(n, loss, {"a": 100.0}) for n, seeds in losses.items() for loss in seeds]
    assert before_the_rise(points)[1] == []


# ------------------------------------------------------------------------------------------------------ not identified


@pytest.mark.slow
def test_too_few_repeated_runs_leave_the_half_life_to_the_prior():
    points = runs(names=["a"]) + runs(names=["b"], budgets=[1 * M, 2 * M, 4 * M, 6 * M, 8 * M])
    found = fit(points, draws=40)
    assert set(found.missing) == {("b", "tau")} and "5 runs, 1 of them with 4 epochs" in found.missing["b", "tau"]
    assert found.law.named["b"].tau == pytest.approx(13) and "tau" not in found.intervals["b"]
    drawn = [law.named["b"].tau for law in found.draws]
    assert min(drawn) >= 10 and max(drawn) <= 17 and max(drawn) - min(drawn) > 4
    fewer = fit(runs(names=["a"]) + runs(names=["b"], budgets=[1 * M, 8 * M, 16 * M, 32 * M]), draws=5)
    assert "4 runs, 3 of them" in fewer.missing["b", "tau"]


def test_one_budget_does_not_identify_a_utility():
    found = fit(runs(names=["a"]) + runs(names=["b"], budgets=[4 * M], seeds=3), draws=5)
    assert "runs at 1 budget" in found.missing["b", "b"] and found.known == ["a"] and list(prefixes(found)) == ["a"]


@pytest.mark.slow
def test_a_flat_profile_is_not_identified():
    """Enough points, all with repeats, but with a utility so small that no half-life shows in the noise."""
    law = UtilityLaw.language_model([Pool("a", 1 * M, -0.22, 5.0), Pool("flat", 1 * M, -0.006, 6.0)], 2.0, 3.0, 1 * M)
    found = fit(runs(law, noise=2e-3, seed=1), draws=5)
    assert ("flat", "tau") in found.missing and "fit about as well" in found.missing["flat", "tau"]
    assert found.law.named["flat"].tau == pytest.approx(13)


@pytest.mark.parametrize("points", [[], runs(names=["a"], budgets=[1 * M]), runs(names=["a"], budgets=[1 * M, 2 * M])])
def test_too_few_points_are_one_line(points):
    with pytest.raises(DataError, match="^not identified: .*runs") as refused:
        fit(points)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------- answers and crossovers


@pytest.fixture(scope="module")
def noisy():
    return fit(runs(noise=5e-4, seed=2, budgets=[*BUDGETS, 64 * M]), draws=30)


@pytest.mark.slow
def test_a_clear_answer_and_one_that_cannot_be_told_apart(noisy):
    few = answer(noisy, 2 * M)
    assert few.best.name == "a" and few.best.loss == few.options[0].loss and few.tied == ()
    (change,) = [c for c in crossovers(noisy, 2 * M, 60 * M) if c.before == "a"]
    assert "a" in {*answer(noisy, change.tokens).tied, answer(noisy, change.tokens).best.name}
    assert answer(noisy, change.tokens).tied


@pytest.mark.slow
def test_equal_pools_cannot_be_told_apart():
    law = UtilityLaw.language_model([Pool("a", M, -0.2, 8.0), Pool("twin", M, -0.2, 8.0)], 2.0, 3.0, M)
    found = fit(runs(law, noise=1e-3, seed=6), draws=40)
    answered = answer(found, 8 * M, {"a": {"a": 1}, "twin": {"twin": 1}})
    assert {answered.best.name, *answered.tied} == {"a", "twin"}


@pytest.mark.slow
def test_nothing_is_recommended_beyond_the_fitted_epochs(noisy):
    assert noisy.last_epochs == {"a": 64.0, "b": 32.0, "c": 16.0}
    far = answer(noisy, 70 * M)
    assert {o.name: o.beyond for o in far.options}["a"] == "a"
    nothing = answer(noisy, 1000 * M)
    assert nothing.best is None and nothing.tied == () and all(option.beyond for option in nothing.options)


@pytest.mark.slow
def test_crossovers_are_where_the_best_prefix_changes(noisy):
    noiseless = fit(runs(), draws=30)
    changes = crossovers(noiseless, 1.5 * M, 60 * M)
    assert changes
    for change in changes:
        before, after = (TRUTH.best_pool(change.tokens * x).count for x in (1 - 1e-4, 1 + 1e-4))
        assert (change.before.count("+") + 1, change.after.count("+") + 1) == (before, after) and before < after
        assert change.interval[0] <= change.tokens * (1 + 1e-6) and change.tokens <= change.interval[1] * (1 + 1e-6)
        assert change.interval[1] < 1.001 * change.interval[0]
    first = crossovers(noisy, 1.5 * M, 60 * M)[0]
    assert first.interval[0] < changes[0].tokens < first.interval[1]
    assert first.interval[1] > 1.01 * first.interval[0]


@pytest.mark.slow
def test_a_change_outside_of_the_budgets_is_an_open_end():
    found = fit(runs(), draws=5)
    first = crossovers(found, 1.5 * M, 60 * M)[0]
    assert crossovers(found, 1.5 * M, first.tokens * 0.9) == []


@pytest.mark.parametrize("reach, expected", [((1.5, 60), None), ((1.2, 2), math.inf), ((40, 60), 0.0)])
def test_a_draw_that_does_not_change_on_the_grid_is_open(reach, expected):
    before, after = {"a": 1.0}, {"a": 1.0, "b": 2.0}
    grid = np.geomspace(reach[0] * M, reach[1] * M, 50)
    found = crossing(TRUTH, grid, before, after, grid[25])
    if expected is None:
        low, high = (TRUTH.loss(found * x, before) - TRUTH.loss(found * x, after) for x in (1 - 1e-6, 1 + 1e-6))
        assert low < 0 < high
    else:
        assert found == expected


def test_gamma_is_calibrated_on_mixtures():
    found = fit(runs(), draws=5)
    mixed = UtilityLaw.language_model(TRUTH.pools, 2.0, 3.0, 1 * M, gamma=0.35)
    unique = {"a": 1 * M, "c": 4 * M}
    held = [Point(n, mixed.loss(n, unique), unique) for n in (8 * M, 32 * M)]
    assert calibrated_gamma(found, held) == pytest.approx(0.35)
    assert mixture_error(with_gamma(found, 0.35).law, held) < 1e-6 < mixture_error(found.law, held)
    plain = [Point(n, TRUTH.loss(n, unique), unique) for n in (8 * M, 32 * M)]
    assert calibrated_gamma(found, plain) == 0
