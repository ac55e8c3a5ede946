"""Intervals against closed forms, brute force, and the coverage that they promise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.launch.report.stats import (
    bootstrap_interval,
    half_width,
    paired,
    pareto_front,
    seeds_to_resolve,
    t_interval,
)

# Two-sided 95 % quantiles of Student's t, from any printed table: degrees of freedom -> value.
T_TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 7: 2.365}


@pytest.mark.parametrize("freedom", T_TABLE)
def test_half_width_is_the_printed_table(freedom):
    n = freedom + 1
    assert half_width(2.0, n) == pytest.approx(T_TABLE[freedom] * 2.0 / math.sqrt(n), rel=3e-4)


def test_t_interval_by_hand():
    low, high = t_interval([1.0, 2.0, 3.0])  # mean 2, sd 1, n 3
    assert (low, high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)


def test_t_interval_covers_the_truth_19_times_in_20():
    trials = 4000
    samples = np.random.default_rng(0).normal(0.3, 1.7, (trials, 4))
    hits = sum(low <= 0.3 <= high for low, high in map(t_interval, samples))
    assert abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_bootstrap_is_the_quantiles_of_all_resamples():
    """With three values all 27 equally likely resamples can be listed; quantiles that no tie touches must agree."""
    sample = [0.0, 1.0, 10.0]
    means = [np.mean(resample) for resample in itertools.product(sample, repeat=3)]
    low, high = bootstrap_interval(sample, level=0.8)
    assert low == pytest.approx(np.quantile(means, 0.1, method="inverted_cdf"))
    assert high == pytest.approx(np.quantile(means, 0.9, method="inverted_cdf"))
    assert bootstrap_interval(sample) == bootstrap_interval(sample)


def test_bootstrap_agrees_with_t_on_a_large_sample():
    sample = np.random.default_rng(1).normal(0, 1, 400)
    assert bootstrap_interval(sample) == pytest.approx(t_interval(sample), abs=0.01)


def test_pairs_that_lack_a_side_are_dropped_and_counted():
    result = paired({0: 1.5, 1: 2.5, 2: 9.0}, {0: 1.0, 1: 1.5, 7: 0.0})
    assert (result.n, result.dropped) == (2, 2)
    assert result.mean == pytest.approx(0.75)
    assert result.sd == pytest.approx(math.sqrt(0.125))


def test_pairing_removes_what_the_seeds_share():
    shared = {seed: float(value) for seed, value in enumerate(np.random.default_rng(2).normal(0, 5, 6))}
    better = {seed: value - 0.1 - 0.001 * seed for seed, value in shared.items()}
    result = paired(better, shared)
    assert result.resolved and -0.11 < result.t[0] < result.t[1] < -0.09


def test_one_seed_has_no_interval_and_no_claim():
    result = paired({0: 1.0}, {0: 2.0})
    assert (result.n, result.mean, result.sd, result.t, result.bootstrap) == (1, -1.0, None, None, None)
    assert not result.resolved
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_equal_runs_have_an_interval_of_no_width():
    same = {0: 1.0, 1: 2.0, 2: 3.0}
    result = paired(same, same)
    assert result.sd == 0 and result.t == result.bootstrap == (0.0, 0.0) and not result.resolved
    shifted = paired({seed: value + 0.5 for seed, value in same.items()}, same)
    assert shifted.t == shifted.bootstrap == (0.5, 0.5) and shifted.resolved


def test_resolved_means_that_zero_lies_outside():
    assert paired({0: 1.0, 1: 1.1, 2: 0.9}, dict.fromkeys(range(3), 0.0)).resolved
    assert paired({0: -1.0, 1: -1.1, 2: -0.9}, dict.fromkeys(range(3), 0.0)).resolved
    assert not paired({0: -1.0, 1: 1.0, 2: 0.1}, dict.fromkeys(range(3), 0.0)).resolved


@given(st.floats(1e-4, 1.0), st.floats(1e-4, 0.1))
@settings(deadline=None)  # scipy's quantiles on a busy machine
def test_seeds_to_resolve_is_the_first_that_is_enough(difference, sd):
    n = seeds_to_resolve(difference, sd)
    if n is None:
        assert half_width(sd, 1000) >= difference
    else:
        assert half_width(sd, n) < difference and (n == 2 or half_width(sd, n - 1) >= difference)


def test_seeds_to_resolve_at_the_ends():
    sd = 0.0013 * math.sqrt(2)  # t * sd / sqrt(n): 3.182 * sd / 2 = 0.0029, 2.776 * sd / sqrt(5) = 0.00228
    assert seeds_to_resolve(0.0023, sd) == 5
    assert seeds_to_resolve(-0.5, 0.0) == 2
    assert seeds_to_resolve(0.0, 0.1) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_is_what_nothing_beats(points):
    front = pareto_front(points)
    for i, (loss, size) in enumerate(points):
        worse = any((a <= loss and b <= size) and (a < loss or b < size) for j, (a, b) in enumerate(points) if j != i)
        assert (i in front) == (not worse)
    assert [points[i] for i in front] == sorted(points[i] for i in front)
