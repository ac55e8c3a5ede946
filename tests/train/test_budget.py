"""Budgets against counting, schedules against their closed forms."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from thriftlab.data.errors import ConfigError
from thriftlab.optim.core.hyper import model_of
from thriftlab.train.budget import SCHEDULES, Budget, Horizon, constant, cosine, cycles, linear, wsd

UNIT = st.floats(0, 1)


@given(st.integers(1, 10**12), st.integers(1, 10**6), st.integers(1, 10**12))
def test_steps_spend_the_budget_and_never_more(tokens, per_step, flops):
    if tokens < per_step:
        with pytest.raises(ConfigError, match="less than"):
            Budget(tokens=tokens).horizon(per_step, flops)
        return
    steps = Budget(tokens=tokens).horizon(per_step, flops).steps
    assert steps * per_step <= tokens < (steps + 1) * per_step


def test_flops_count_tokens_times_their_price():
    assert Budget(flops=6e9).horizon(1000, 2_000_000) == Horizon(steps=3)
    assert Budget(flops=5.9e9).horizon(1000, 2_000_000) == Horizon(steps=2)
    with pytest.raises(ConfigError, match=r"budget\.flops = 1e\+09 is less than the 2e\+09 flops of one step"):
        Budget(flops=1e9).horizon(1000, 2_000_000)


@given(st.integers(1, 10**9), st.integers(0, 18))
def test_large_numbers_are_exact(mantissa, exponent):
    text = f"{mantissa}e{exponent}"
    exact = mantissa * 10**exponent
    assert Budget(tokens=text).tokens == exact
    assert Budget(tokens=float(text)).tokens == int(float(text))
    assert Budget(tokens=f"{exact:_}").tokens == exact
    assert Budget.model_validate(f"tokens={text}") == Budget(tokens=exact)


@pytest.mark.parametrize("tokens", ["1.5", 1.5, "inf", "nan", "many", 0, -1, True and "true", [1]])
def test_tokens_that_are_no_number_of_tokens(tokens):
    with pytest.raises(ValidationError):
        Budget(tokens=tokens)


@pytest.mark.parametrize("given", [{}, {"tokens": 1, "flops": 1}, {"flops": 1.0, "seconds": 1.0}])
def test_one_kind_of_budget(given):
    with pytest.raises(ValidationError, match="takes one of tokens, flops, seconds"):
        Budget(**given)


@pytest.mark.parametrize("horizon", [Horizon(steps=7), Horizon(seconds=3.5)])
def test_progress_rises_to_one_and_ends(horizon):
    times = [step * 0.5 for step in range(8)]  # half a second a step: both horizons end after seven
    progress = [horizon.progress(step, elapsed) for step, elapsed in enumerate(times)]
    assert progress == sorted(progress) and 0 <= progress[0] and progress[-1] == 1
    assert [horizon.over(step, elapsed) for step, elapsed in enumerate(times)] == [False] * 7 + [True]


def test_progress_of_a_step_is_the_middle_of_its_share():
    assert [Horizon(steps=4).progress(step, 123.0) for step in range(4)] == [1 / 8, 3 / 8, 5 / 8, 7 / 8]


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"jagged"}))
@given(st.data())
def test_every_schedule_stays_in_the_unit_interval_and_is_continuous(name, data):
    warmup = data.draw(st.floats(0, 0.5), label="warmup")
    progress = data.draw(UNIT, label="progress")
    f = SCHEDULES[name]
    assert 0 <= f(progress, warmup=warmup) <= 1 + 1e-12
    if warmup >= 0.01:
        assert abs(f(progress, warmup=warmup) - f(min(progress + 1e-9, 1.0), warmup=warmup)) < 1e-6
        assert f(warmup, warmup=warmup) == pytest.approx(1, abs=1e-12)


@given(st.integers(1, 9), st.floats(0, 0.9), UNIT, UNIT)
def test_cycles_are_the_cosine_again_and_again(count, warmup, final, part):
    for k in range(count):
        inside = min(max(part, 1e-6), 1 - 1e-6)  # of the cycle
        once = cosine(inside, warmup=warmup, final=final)
        assert cycles((k + inside) / count, warmup=warmup, cycles=count, final=final) == pytest.approx(once, abs=1e-6)
    assert cycles(1.0, warmup=warmup, cycles=count, final=final) == pytest.approx(final)
    steps = [Horizon(steps=200_000).progress(step, 0.0) for step in (9_999, 10_000)]  # FRUGAL at 60M
    end, start = (cycles(progress, cycles=20) for progress in steps)
    assert end == pytest.approx(0.1, abs=1e-6) and start == pytest.approx(0.5 / 1000)


@given(st.floats(0.01, 0.99), UNIT)
def test_warm_up_is_a_straight_line_from_zero(warmup, part):
    for schedule in (constant, linear, cosine):
        assert schedule(part * warmup * 0.999, warmup=warmup) == pytest.approx(part * 0.999, abs=1e-9)


@given(UNIT, st.floats(0, 0.9), UNIT)
def test_linear_and_cosine_are_their_formulas(progress, warmup, final):
    if progress < warmup:
        return
    x = Fraction(progress - warmup) / Fraction(1 - warmup)
    assert linear(progress, warmup=warmup, final=final) == pytest.approx(float(1 - x + x * Fraction(final)), abs=1e-12)
    expected = final + (1 - final) * math.cos(math.pi * float(x) / 2) ** 2  # (1 + cos 2a) / 2 = cos(a)^2
    assert cosine(progress, warmup=warmup, final=final) == pytest.approx(expected, abs=1e-12)


def test_wsd_has_three_parts():
    f = lambda p: wsd(p, warmup=0.25, decay=0.5, final=0.2)  # noqa: E731
    assert [f(p) for p in (0, 0.125, 0.25, 0.4, 0.5, 0.75, 1.0)] == pytest.approx([0, 0.5, 1, 1, 1, 0.6, 0.2])
    with pytest.raises(ValueError, match="overlap"):
        wsd(0.5, warmup=0.6, decay=0.5)


def test_mean_factor_over_a_run_is_the_integral():
    """The midpoint rule is exact on straight lines, so no step is lost at either end."""
    progress = [Horizon(steps=20).progress(step, 0.0) for step in range(20)]
    assert math.fsum(wsd(p, warmup=0.1, decay=0.2, final=0.5) for p in progress) / 20 == pytest.approx(0.9)
    assert math.fsum(linear(p, warmup=0.1, final=0.0) for p in progress) / 20 == pytest.approx(0.5)
    assert math.fsum(cosine(p, warmup=0.0, final=0.1) for p in progress) / 20 == pytest.approx(0.55)


@pytest.mark.parametrize("name", SCHEDULES)
def test_parameters_are_declared_with_bounds_and_words(name):
    model = model_of(SCHEDULES[name], name)
    assert model().name == name
    for key, field in model.model_fields.items():
        if key != "name":
            assert field.description
            with pytest.raises(ValidationError):
                model(**{key: 1.5})
