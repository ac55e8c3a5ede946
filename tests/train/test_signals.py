"""Every signal's weights against the papers' formulas; what follows from these; what published code gets wrong."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tools import signal_equations as slow
from thriftlab.train.signals import SIGNALS, loss_weights
from thriftlab.train.signals.base import by_domain
from thriftlab.train.signals.coba import balance
from thriftlab.train.signals.reweight import bounds, doubled_sum, water_level

STRATEGIES = ["linupper", "quadratic", "extremes"]
LOSSES = st.lists(st.floats(0.0, 20, width=32), min_size=1, max_size=40)


def drawn(rows, spread, seed=0):
    return 3 + spread * torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- the bare formula


@pytest.mark.parametrize("strategy", [*STRATEGIES, "uniform"])
@given(
    losses=LOSSES,
    r=st.sampled_from([0.02, 0.1, 0.4, 1.0, 10.0, 100.0]),
    delta=st.sampled_from([0.25, 1.0, 3.0]),
    outlier=st.sampled_from([None, 1e4, math.nan]),
)
@settings(max_examples=60, deadline=None)
def test_the_formula_is_the_papers(strategy, losses, r, delta, outlier):
    losses = losses if outlier is None else [*losses, outlier]
    exact = slow.softmax_weights(losses, strategy, r, delta)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-7)):
        got = loss_weights(torch.tensor(losses, dtype=dtype), strategy, r, delta)
        assert got.dtype == dtype
        assert got.tolist() == pytest.approx(exact, rel=tolerance, abs=1e-30)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spread", [2.0, 0.01, 5e-4, 5e-5])
def test_nothing_cancels_in_fp32(strategy, spread):
    losses = drawn(48, spread).float()
    exact = slow.softmax_weights(losses.tolist(), strategy, 0.4)
    assert loss_weights(losses, strategy, 0.4).tolist() == pytest.approx(exact, rel=2e-7)
    in_a_run = weights_of(strategy, losses[:, None])[:, 0]  # which stays in fp32
    assert (in_a_run / in_a_run.sum()).tolist() == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(scale=st.floats(0.01, 100), shift=st.floats(-5, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_stretching_all_losses_changes_nothing(strategy, scale, shift, seed):
    losses = drawn(16, 1.0, seed)
    torch.testing.assert_close(
        loss_weights(scale * losses + shift, strategy, 0.4), loss_weights(losses, strategy, 0.4), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(("r", "ratio"), [(0.4, 12.2), (1, 2.72), (10, 1.105), (100, 1.01)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_weight_is_more_than_e_to_the_1_over_r_times_another(strategy, r, ratio):
    weights = loss_weights(torch.cat([drawn(60, 2.0), torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)]), strategy, r)
    assert weights.max() / weights.min() <= math.exp(1 / r) * (1 + 1e-9)
    assert math.exp(1 / r) == pytest.approx(ratio, rel=2e-3)
    assert weights.max() / weights.min() > 1 + 0.99 * (math.exp(1 / r) - 1)  # and the bound is reached


def test_one_outlier_takes_the_batch_and_what_holds_it_back():
    """Seven losses of about 3 and one of 10."""
    losses = torch.tensor([2.9, 2.95, 3.0, 3.0, 3.0, 3.05, 3.1, 10.0], dtype=torch.float64)
    relative = 8 * loss_weights(losses, "linupper", 0.4)
    assert relative[-1].item() == pytest.approx(4.98, abs=0.1)
    assert (1 / (8 * loss_weights(losses, "linupper", 0.4).square().sum())).item() == pytest.approx(0.31, abs=0.01)
    for m, factor in ((48, 9.9), (128, 11.2)):
        one = loss_weights(torch.tensor([3.0] * (m - 1) + [10.0]), "linupper", 0.4)
        assert (m * one[-1]).item() == pytest.approx(factor, abs=0.05)
        assert factor == pytest.approx(m / (1 + (m - 1) * math.exp(-2.5)), abs=0.05)
    for options in ({"norm": "mad"}, {"norm": "quantile", "tail": 0.15}, {"w_max": 2.0}):
        held = weights_of("linupper", losses[:, None], r=0.4, **options)
        assert (8 * held / held.sum())[-1] < 2.01, options


def test_one_outlier_below_is_let_go_alone():
    weights = 8 * loss_weights(torch.tensor([3.0] * 7 + [0.1]), "linupper", 0.4)
    assert weights[-1].item() == pytest.approx(0.093, abs=0.001)
    torch.testing.assert_close(weights[:-1], weights[:1].expand(7))


@pytest.mark.parametrize("strategy", [*STRATEGIES, "uniform"])
def test_one_sample_and_equal_losses_are_uniform(strategy):
    assert loss_weights(torch.tensor([4.2]), strategy, 0.02).tolist() == [1.0]
    assert loss_weights(torch.full((7,), 1e4), strategy, 0.02).tolist() == pytest.approx([1 / 7] * 7)


def test_uniform_is_a_constant():
    """In a published snippet it is exp(h / r)."""
    assert loss_weights(drawn(8, 2.0), "uniform", 1.0).tolist() == [1 / 8] * 8


def test_delta_counts_as_one_over_r_and_not_at_all_for_quadratic():
    losses = drawn(12, 1.0)
    for strategy in ("linupper", "extremes"):
        torch.testing.assert_close(loss_weights(losses, strategy, 0.8, 2.0), loss_weights(losses, strategy, 0.4, 1.0))
    torch.testing.assert_close(loss_weights(losses, "quadratic", 0.4, 3.0), loss_weights(losses, "quadratic", 0.4))


def test_a_row_without_targets_weighs_nothing_and_spoils_nothing():
    losses = drawn(6, 2.0)
    with_nan = torch.cat([losses[:2], torch.tensor([math.nan], dtype=torch.float64), losses[2:]])
    for strategy in STRATEGIES:
        got, expected = loss_weights(with_nan, strategy, 0.4), loss_weights(losses, strategy, 0.4)
        assert got[2] == 0
        torch.testing.assert_close(torch.cat([got[:2], got[3:]]), expected)
    assert loss_weights(torch.tensor([math.nan] * 3), "linupper", 0.4).tolist() == [0.0] * 3


def test_losses_in_bf16_are_not_reduced_in_bf16():
    losses = drawn(32, 0.5).bfloat16()
    got = loss_weights(losses, "linupper", 0.4)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(slow.softmax_weights(losses.double().tolist(), "linupper", 0.4), rel=1e-5)


def test_what_the_formula_refuses():
    with pytest.raises(ValueError, match="'upper' is unknown; there are linupper, quadratic, extremes and uniform"):
        loss_weights(torch.ones(3), "upper", 1.0)
    with pytest.raises(ValueError, match="above 0"):
        loss_weights(torch.ones(3), "linupper", 0.0)
    for shape in ((), (0,), (2, 3)):
        with pytest.raises(ValueError, match=r"of shape .*; one mean loss for each sample is \[samples\]"):
            loss_weights(torch.ones(shape), "linupper", 0.4)
    assert loss_weights(torch.full((3,), torch.nan), "extremes", 0.4).tolist() == [0, 0, 0]


# ----------------------------------------------------------------------------------- signals, asked as the trainer does


def weights_of(name, losses, mask=None, progress=0.9, **options):
    """Of one batch, statistics and all, [rows, seq] or [rows, 1]."""
    signal = SIGNALS[name](**options)
    mask = torch.ones_like(losses) if mask is None else mask
    statistics = signal.statistics(losses=losses, mask=mask, progress=progress)
    return signal.weights(token_loss=losses, statistics=statistics, mask=mask > 0, progress=progress)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"norm": "quantile", "tail": 0.1}, {"norm": "mad"}, {"min_range": 5.0},
                                     {"w_max": 1.3}, {"r": 1.5}], ids=str)  # fmt: skip
def test_reweighting_is_the_papers_with_its_options(name, options):
    losses = torch.cat([drawn(20, 2.0), torch.tensor([9.0], dtype=torch.float64)])[:, None]
    tokens = torch.arange(21, dtype=torch.float64)[:, None] % 5  # some rows have none
    expected, _ = slow.reweighted(
        losses.expand(21, 4).numpy(), (torch.arange(4) < tokens).numpy(), name, **{"r": 0.4, **options}
    )
    got = weights_of(name, losses, tokens, **options) * (torch.arange(4) < tokens)
    torch.testing.assert_close(got / got.sum(), torch.from_numpy(expected / expected.sum()), rtol=1e-9, atol=1e-12)
    assert 0.5 < (got.sum() / tokens.sum()).item() < 1 + 1e-9  # gradients keep their usual size


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(0, 5)), min_size=1, max_size=12), st.floats(1, 8))
@example([(2.0, 1), (1.9, 3)], 1.0)
@example([(1.9, 3), (5.0, 0), (2.0, 1)], 1.0)
@settings(max_examples=200, deadline=None)
def test_the_water_level(rows, w_max):
    weights = torch.tensor([[w] if n else [0.0] for w, n in rows], dtype=torch.float64)
    tokens = torch.tensor([[float(n)] for _, n in rows], dtype=torch.float64)
    if tokens.sum() == 0:
        return
    cut = weights.clamp(max=water_level(weights, tokens, w_max))
    mean = (cut * tokens).sum() / tokens.sum()
    assert cut.max() <= w_max * mean * (1 + 1e-9)
    exact = slow.capped([w for w, n in rows if n], [n for _, n in rows if n], w_max)
    assert cut[tokens > 0].tolist() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 1000])
def test_running_sums_by_doubling_are_running_sums(count):
    values = torch.randint(-9, 9, (count,), generator=torch.Generator().manual_seed(count)).double()
    kept = values.clone()
    assert torch.equal(doubled_sum(values), values.cumsum(0))  # integers, so exact in any order
    assert torch.equal(values, kept)


def test_the_temperature_over_a_run():
    signal = SIGNALS["linupper"](r=0.4, r_final=0.1, warmup=0.1, ramp=0.2)
    assert signal.idle(0.05) and not signal.idle(0.1)
    assert [signal.temperature(p) for p in (0.1, 0.2, 0.3, 0.65, 1.0)] == pytest.approx(
        [100, math.sqrt(100 * 0.4), 0.4, math.sqrt(0.4 * 0.1), 0.1]
    )
    constant = SIGNALS["linupper"](r=0.7)
    assert {constant.temperature(p) for p in (0.05, 0.5, 1.0)} == {0.7}
    with pytest.raises(ValueError, match="leave nothing"):
        SIGNALS["linupper"](warmup=0.6, ramp=0.4)


def test_mad_is_three_standard_deviations_of_a_normal_batch():
    losses = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 4
    low, high = bounds("mad", losses)
    assert [low.item(), high.item()] == pytest.approx([4 - 0.9, 4 + 0.9], abs=0.01)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("norm", ["minmax", "quantile", "mad"])
def test_nothing_is_known_and_nothing_is_nan(name, norm):
    """All rows without targets; then one sample, then equal ones."""
    none, some = torch.zeros(4, 1), torch.full((4, 1), 3.0)
    for mask in (none, some):
        for rows in (1, 4):
            got = weights_of(name, some[:rows], mask[:rows], norm=norm, w_max=2.0)
            assert got.isfinite().all() and (got == got[0]).all() and got[0] > 0
    spoiled = some.clone()
    spoiled[1] = math.nan
    signal = SIGNALS[name](norm=norm)
    statistics = signal.statistics(losses=drawn(4, 1.0)[:, None], mask=some, progress=1.0)
    assert signal.weights(token_loss=spoiled, statistics=statistics, progress=1.0).isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_has_the_gradient_of_the_focal_loss(gamma):
    losses = torch.tensor([[1e-7, 1e-3, 0.1, 0.7, 3.0, 12.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(((-torch.expm1(-losses)) ** gamma * losses).sum(), losses)
    got = SIGNALS["focal"](gamma=gamma).weights(token_loss=losses.detach())
    torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-15)
    alone = SIGNALS["focal"](gamma=gamma, detached=True).weights(token_loss=losses.detach())
    torch.testing.assert_close(alone, (-torch.expm1(-losses.detach())) ** gamma)
    assert SIGNALS["focal"](gamma=gamma).weights(token_loss=torch.zeros(1, 3)).isfinite().all()  # masked tokens


def test_focal_survives_a_loss_that_rounding_made_negative():
    got = SIGNALS["focal"](gamma=0.5).weights(token_loss=torch.tensor([[-1e-7]]))
    assert got.isfinite().all() and (got >= 0).all()


def test_focal_keeps_its_digits_where_p_is_nearly_one():
    tiny = torch.tensor([[1e-9]])
    assert SIGNALS["focal"](gamma=1.0, detached=True).weights(token_loss=tiny).item() == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize("keep", [0.1, 0.6, 0.95, 1.0])
def test_rho1_chooses_the_largest_excess_of_all_tokens(keep):
    draw = torch.Generator().manual_seed(1)
    excess, mask = torch.randn(6, 9, generator=draw, dtype=torch.float64), torch.rand(6, 9, generator=draw) < 0.8
    expected, _ = slow.rho1(excess.numpy(), mask.numpy(), np.zeros((6, 9)), keep)
    got = weights_of("rho1", excess, mask.double(), reference="-", keep=keep)
    torch.testing.assert_close(got * mask, torch.from_numpy(expected))
    assert not got[~mask].any() and got.sum().item() == pytest.approx(keep * mask.sum().item())


def test_ties_of_rho1_share_alike_in_any_order():
    excess = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0, 2.0, 0.0, 0.0]])
    got = weights_of("rho1", excess, reference="-", keep=0.5)
    assert got.tolist() == [[pytest.approx(2 / 3), 1, pytest.approx(2 / 3), pytest.approx(2 / 3), 0, 1, 0, 0]]


def three_domains(seed=0, rows=8, seq=5):
    """Losses, reference, mask and domains; the third domain is in the first batches only."""
    draw = torch.Generator().manual_seed(seed)
    losses, reference = (torch.rand(rows, seq, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    mask = torch.rand(rows, seq, generator=draw) < 0.8
    mask[1] = False
    domain = torch.randint(3 if seed < 3 else 2, (rows,), generator=draw)
    return losses, reference, mask, domain


def row_scores(signal, losses, reference, mask):
    score = torch.where(mask, signal.score(token_loss=losses, reference_loss=reference), 0)
    count = mask.sum(1, keepdim=True)
    return score.sum(1, keepdim=True) / count.clamp(min=1), count.double()


def test_doremi_is_the_papers_update():
    signal = SIGNALS["doremi"](reference="-", eta=0.7, smoothing=0.01)
    state = signal.state(["a", "b", "c"])
    alpha, last, means = [1 / 3] * 3, [0.0] * 3, []
    for seed in range(6):
        losses, reference, mask, domain = three_domains(seed)
        score, count = row_scores(signal, losses, reference, mask)
        statistics = signal.statistics(losses=score, mask=count, domain_id=domain, state=state)
        signal.update(statistics=statistics, state=state)
        arrays = (t.numpy() for t in (losses, mask, domain, reference))
        alpha, last = slow.doremi_alpha(alpha, last, *arrays, 0.7, 0.01)
        means.append(alpha)
        assert state["alpha"].tolist() == pytest.approx(alpha, rel=1e-12)
    assert signal.report(state)["mean_alpha"].tolist() == pytest.approx(np.mean(means, 0), rel=1e-12)


def test_doremi_clips_tokens_and_not_means():
    """The example of its descendant: 0.15 where the mean is clipped, 0.033 where nothing is."""
    signal, reference = SIGNALS["doremi"](reference="-"), torch.zeros(1, 3)
    losses = torch.tensor([[0.3, -0.35, 0.15]])
    score, _ = row_scores(signal, losses, reference, torch.ones(1, 3, dtype=torch.bool))
    assert score.item() == pytest.approx(0.15) and losses.mean().item() == pytest.approx(0.0333, abs=1e-3)


def test_a_domain_without_tokens_divides_nothing_by_zero():
    for name in ("mftcoder", "domains", "doremi", "coba", "famo"):
        signal = SIGNALS[name](**({"reference": "-"} if name == "doremi" else {}))
        state, domain = signal.state(["a", "b"]), torch.tensor([0, 0])
        losses, count = torch.ones(2, 1), torch.full((2, 1), 4.0)
        statistics = signal.statistics(losses=losses, mask=count, domain_id=domain, state=state, progress=0.5)
        got = signal.weights(
            token_loss=losses, mask=torch.ones(2, 4) > 0, domain_id=domain, state=state, statistics=statistics,
            domain_tokens=torch.tensor([8.0, 0.0]), domain_samples=torch.tensor([2.0, 0.0]),
        )  # fmt: skip
        assert got.isfinite().all() and (got > 0).all(), name


@pytest.mark.parametrize(("window", "start", "k"), [(4, 3, 3), (6, 2, 2), (3, 5, 4)])
def test_coba_is_the_papers(window, start, k):
    signal = SIGNALS["coba"](every=2, window=2 * window, warmup=2 * start, tau=5.0)
    state = signal.state([str(i) for i in range(k)])
    draw = np.random.default_rng(0)
    raw = 4 * np.exp(-0.02 * np.arange(20)[:, None] * draw.random(k)) + 0.01 * draw.standard_normal((20, k))
    for i, losses in enumerate(raw):
        signal.validated(losses=torch.from_numpy(losses), state=state, step=2 * i)
        expected = slow.coba(list(raw[: i + 1] / raw[0]), window, start, 5.0)
        assert state["alpha"].tolist() == pytest.approx(expected, rel=1e-6), i
    assert len(state["losses"]) == len(state["slopes"]) == window


def test_cobas_divergence_factor_stays_a_part():
    """The newest slope is by far the steepest: unbounded, the factor is 3, and ACS would count minus two times."""
    slopes = torch.tensor([[-0.1, -0.1], [-0.1, -0.1], [-0.3, -0.6]], dtype=torch.float64)
    worst = torch.tensor([-0.1, -0.1, -0.6], dtype=torch.float64)
    now = slopes[-1]
    relative = (2 * now / now.abs().sum()).softmax(0)
    assert balance(slopes, worst, 5.0).tolist() == pytest.approx((2 * relative).softmax(0).tolist())


def test_coba_favours_the_slower_task_and_floors_the_others():
    slow_one = torch.tensor([[-1e-4, -0.1, -0.1]] * 4, dtype=torch.float64)
    got = balance(slow_one, torch.full((4,), -0.1, dtype=torch.float64), 5.0)
    assert got.argmax() == 0 and got.sum().item() == pytest.approx(1)
    many = torch.full((3, 30), -1e-6, dtype=torch.float64)
    many[:, 0] = -1.0
    got = balance(many, torch.full((3,), -1e-6, dtype=torch.float64), 5.0)
    assert got.min() >= 1 / 300 * (1 - 1e-9)


def test_famo_takes_weight_from_what_improves_faster():
    signal = SIGNALS["famo"](step_size=0.1, decay=0.0)
    state = signal.state(["fast", "slow"])
    for i in range(12):
        signal.validated(losses=torch.tensor([4.0 * 0.9**i, 4.0 * 0.99**i], dtype=torch.float64), state=state)
    alpha = signal.report(state)["alpha"]
    assert alpha[0] < 0.35 and alpha.sum().item() == pytest.approx(1)


def test_famo_is_adam_down_the_jacobian():
    """Against autograd and torch's own Adam."""
    signal = SIGNALS["famo"](step_size=0.03, decay=0.2)
    state = signal.state(["a", "b", "c"])
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=0.03, weight_decay=0.2)
    losses = 2 + torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signal.validated(losses=losses[0], state=state)
    for before, after in zip(losses[:-1], losses[1:], strict=True):
        (xi.grad,) = torch.autograd.grad(xi.softmax(0), xi, before.log() - after.log())
        adam.step()
        signal.validated(losses=after, state=state)
        torch.testing.assert_close(state["xi"], xi.detach())


@pytest.mark.parametrize("first", ["easy", "hard"])
def test_the_curriculum_weighs_samples_and_not_batches(first):
    losses = drawn(6, 2.0)[:, None]
    for progress in (0.0, 0.2, 0.4):
        expected, _ = slow.curriculum(losses.numpy(), np.ones((6, 1), bool), progress, 0.5, first)
        got = weights_of("curriculum", losses, until=0.5, first=first, progress=progress)
        torch.testing.assert_close(got, torch.from_numpy(expected))
        per_sample, per_batch = (got * losses).mean(), got.mean() * losses.mean()
        assert abs(per_sample - per_batch) > 0.01 * (0.5 - progress)
    signal = SIGNALS["curriculum"](until=0.5)
    assert signal.idle(0.5) and not signal.idle(0.49)


def test_equal_losses_are_no_division_by_zero_in_a_curriculum():
    for first in ("easy", "hard"):
        got = weights_of("curriculum", torch.full((3, 1), 2.0), first=first, progress=0.0)
        assert (got == 0.5).all()


@pytest.mark.parametrize("name", sorted(SIGNALS))
def test_every_signal_says_what_it_is(name):
    signal = SIGNALS[name]
    assert signal.__doc__ and signal.unit in ("token", "sample", "document", "domain")
    assert signal.denominator in ("weights", "mask")


def test_by_domain_sums_rows():
    assert by_domain(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]), 4).tolist() == [2.0, 0.0, 5.0, 0.0]
