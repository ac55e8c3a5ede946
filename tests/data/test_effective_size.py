"""Effective sizes and damage on made losses with known answers, and against numpy's own fit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftlab.data.effective_size import (
    fit_size_law,
    harm_index,
    interpolated_size,
    off_scale,
    rising,
    verdict,
)
from thriftlab.data.errors import DataError

PUBLISHED = {24_576: 1.6836, 55_296: 1.6622, 98_304: 1.6407, 221_184: 1.6163}  # of the miniature in the specification


def test_a_planted_law_is_found_and_turned_round():
    a, alpha = 0.9, 0.031
    losses = {n: math.exp(a - alpha * math.log(n)) for n in (10_000, 30_000, 100_000, 400_000)}
    law = fit_size_law(losses)
    assert law.a == pytest.approx(a, rel=1e-12) and law.alpha == pytest.approx(alpha, rel=1e-12)
    assert (law.smallest, law.largest) == (10_000, 400_000) and law.residual < 1e-12
    for n, loss in losses.items():
        assert law.size(loss) == pytest.approx(n, rel=1e-9)
    assert law.size(math.exp(a - alpha * math.log(50_000))) == pytest.approx(50_000, rel=1e-9)


def test_the_published_controls_give_the_published_law_and_multiplier():
    law = fit_size_law(PUBLISHED)
    assert law.a == pytest.approx(0.7118, abs=5e-4) and law.alpha == pytest.approx(0.0188, abs=5e-5)
    assert law.residual < 0.003
    assert 0.47 <= law.size(1.664) / 98_304 <= 0.52 and law.size(1.652) / 98_304 == pytest.approx(0.72, abs=0.03)
    assert off_scale(law.size(1.930), law.smallest, law.largest) == "below"


@given(st.lists(st.floats(0.5, 6.0), min_size=4, max_size=7, unique=True), st.randoms(use_true_random=False))
def test_the_fit_is_least_squares(values, random):
    values = sorted(values, reverse=True)
    sizes = sorted(random.sample(range(1_000, 1_000_000), len(values)))
    law = fit_size_law(dict(zip(sizes, values, strict=True)))
    slope, intercept = np.polyfit(np.log(sizes), np.log(values), 1)
    assert law.alpha == pytest.approx(-slope, rel=1e-6, abs=1e-9)
    assert law.a == pytest.approx(intercept, rel=1e-6, abs=1e-9)


def test_a_size_is_as_sensitive_as_the_formula_says():
    law = fit_size_law(PUBLISHED)
    step = 1e-6
    slope = (math.log(law.size(1.65 + step)) - math.log(law.size(1.65 - step))) / (2 * step)
    assert slope == pytest.approx(-1 / (law.alpha * 1.65), rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({1: 3.0, 2: 2.0, 3: 1.0}, "takes 4 sizes of controls or more, and there are 3"),
        ({1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}, "does not fall"),
    ],
)
def test_what_is_no_law_is_refused_in_one_line(losses, words):
    with pytest.raises(DataError, match=words) as error:
        fit_size_law(losses)
    assert "\n" not in str(error.value)


def test_a_size_beyond_the_controls_is_off_scale():
    assert [off_scale(size, 10, 40) for size in (9.9, 10, 25, 40, 40.1)] == ["below", None, None, None, "above"]


# ------------------------------------------------------------------------------------------------- interpolation


@pytest.mark.parametrize("sign", [1, -1])
def test_a_measure_is_read_off_between_neighbours(sign):
    controls = {100: sign * 1.0, 200: sign * 2.0, 800: sign * 3.0}
    assert interpolated_size(controls, sign * 2.5) == pytest.approx(400)  # halfway in ln N
    assert interpolated_size(controls, sign * 1.5) == pytest.approx(math.sqrt(100 * 200))
    assert interpolated_size(controls, sign * 2.0) == pytest.approx(200)
    assert interpolated_size(controls, sign * 0.9) == 0 and interpolated_size(controls, sign * 3.1) == math.inf


def test_neighbours_in_the_wrong_order_count_as_one():
    controls = {100: 1.0, 200: 2.2, 400: 1.8, 800: 3.0}  # 200 and 400: 2.0 at the size between them
    between = math.sqrt(200 * 400)
    assert interpolated_size(controls, 2.0) == pytest.approx(between)
    assert interpolated_size(controls, 1.5) == pytest.approx(math.sqrt(100 * between))


def test_a_measure_that_does_not_change_gives_no_size():
    assert math.isnan(interpolated_size({100: 1.0, 200: 1.0, 400: 1.0}, 1.0))


def lowest_squares(y):
    """The non-decreasing sequence next to y, by the minimax formula of isotonic regression."""
    mean = {(i, j): sum(y[i : j + 1]) / (j + 1 - i) for i in range(len(y)) for j in range(i, len(y))}
    return [max(min(mean[i, j] for j in range(k, len(y))) for i in range(k + 1)) for k in range(len(y))]


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8))
def test_what_is_made_to_rise_is_the_isotonic_regression(y):
    x = list(range(len(y)))
    found = rising(x, y)
    assert [value for _, value in found] == sorted({value for _, value in found})
    expected = lowest_squares(y)
    assert sorted(set(np.round(expected, 9))) == pytest.approx(sorted({round(value, 9) for _, value in found}))
    for at, value in found:
        block = [i for i, each in enumerate(expected) if abs(each - value) < 1e-9]
        assert at == pytest.approx(sum(block) / len(block))


# -------------------------------------------------------------------------------------------------------- damage


def test_the_harm_index_has_its_three_fixed_points():
    fewer, full = 1.72, 1.64
    assert harm_index(full, fewer, full) == pytest.approx(-1)  # as good as other text
    assert harm_index(fewer, fewer, full) == 0  # wasted
    assert harm_index(1.93, fewer, full) == pytest.approx((1.93 - 1.72) / (1.72 - 1.64))
    assert math.isnan(harm_index(1.93, 1.64, 1.64)) and math.isnan(harm_index(1.93, 1.63, 1.64))


@pytest.mark.parametrize(
    ("interval", "cost", "word"),
    [
        ((0.1, 0.3), 0.1, "harmful"),
        ((-0.3, -0.1), 0.1, "useful"),
        ((-0.04, 0.03), 0.1, "wasted"),
        ((-0.03, 0.06), 0.1, "no claim"),
        ((-0.06, 0.03), 0.1, "no claim"),
        ((0.0, 0.04), 0.1, "wasted"),
        ((-0.001, 0.001), -0.1, "no claim"),
    ],
)
def test_the_word_is_that_of_the_interval(interval, cost, word):
    assert verdict(interval, cost) == word
