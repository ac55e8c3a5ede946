"""Stable-SPAM against its equations in float64, recorded trajectories, and AdamW, which it is without its two means."""

import math

import numpy as np
import pytest
import torch

from tests.tools.trajectories import follow, recorded
from thriftlab.optim import AdamW, StableSPAM, predicted_state_bytes, state_bytes

SHAPES = {"matrix": (6, 8), "tall": (9, 2), "bias": (7,), "scalar": (), "image": (2, 3, 4)}
HYPER = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, gammas=(0.7, 0.9, 0.95), gap=6)
STEPS = 20


def grad(shape, t):
    """Now and then with a spike, once ten times as long, once zero."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(100 * t + len(shape))).double()
    if t % 4 == 3 and found.numel():
        found.view(-1)[-1] = 30.0
    return found * {8: 10.0, 11: 0.0}.get(t, 1.0)


class Reference:
    """One tensor, in numpy and Python's floats."""

    def __init__(self, weight, reset, total=None, eta_min=0.5):
        self.w, self.reset, self.total, self.eta_min = weight.detach().numpy().copy(), reset, total, eta_min
        self.m = self.v = np.zeros_like(self.w)
        self.top = self.mu = self.nu = 0.0
        self.t = self.k = 0

    def step(self, g):
        (b1, b2), (g1, g2, g3), eps, lr = (HYPER[key] for key in ("betas", "gammas", "eps", "lr"))
        self.t, self.k = self.t + 1, self.k + 1
        c = 1.0
        if self.total:
            c = self.eta_min + (1 - self.eta_min) / 2 * (1 + math.cos(math.pi * self.t / (self.total + 1)))
        k = self.t if self.reset == "exact" else self.k
        largest = np.abs(g).max()
        self.top = g3 * self.top + (1 - g3) * largest
        limit = self.top / (1 - g3**k)
        g = np.where(np.abs(g) > limit, g / (largest or 1) * limit, g)
        norm = math.sqrt((g**2).sum())
        self.mu = g1 * c * self.mu + (1 - g1 * c) * norm
        self.nu = g2 * self.nu + (1 - g2) * norm**2
        if norm:
            g = g / norm * (self.mu / (1 - (g1 * c) ** k)) / (math.sqrt(self.nu / (1 - g2**k)) + eps)
        old = self.m, self.v
        if self.t % HYPER["gap"] == 0:
            self.k, zero = 1, np.zeros_like(self.w)
            self.m, self.v = zero, zero
            if self.reset == "exact":
                old = zero, zero
        m, v = b1 * c * old[0] + (1 - b1 * c) * g, b2 * old[1] + (1 - b2) * g * g
        if self.reset == "exact" or self.t % HYPER["gap"]:
            self.m, self.v = m, v
        direction = m / (1 - (b1 * c) ** self.k) / (np.sqrt(v / (1 - b2**self.k)) + eps)
        self.w = (1 - lr * HYPER["weight_decay"]) * self.w - lr * direction


@pytest.mark.parametrize("total", [None, 15])
@pytest.mark.parametrize("reset", ["exact", "reference"])
def test_is_its_equations_in_float64(reset, total):
    params = {name: torch.nn.Parameter(grad(shape, -1) + 1) for name, shape in SHAPES.items()}
    optimizer = StableSPAM(params.items(), reset=reset, total=total, **HYPER)
    references = {name: Reference(p, reset, total) for name, p in params.items()}
    for t in range(STEPS if total is None else total):
        for name, p in params.items():
            p.grad = grad(SHAPES[name], t)
        optimizer.step()
        for name, p in params.items():
            references[name].step(p.grad.numpy())
            assert np.allclose(p.detach().numpy(), references[name].w, rtol=1e-11, atol=1e-11), (name, t)
            assert float(optimizer.state[p]["mean_max"]) == pytest.approx(references[name].top, rel=1e-12)


@pytest.mark.parametrize(("name", "gap"), [("stable_spam_no_reset", 1000), ("stable_spam_reset_exact", 10)])
def test_follows_the_recorded(name, gap):
    assert follow(recorded(name), lambda params: StableSPAM(params.items(), lr=1e-3, gap=gap)) < 5e-4 * 1e-3


def test_without_a_past_it_is_adamw_on_gradients_of_norm_one():
    """With decays of 0 the limit is the largest entry, and the mean norm is the root mean square."""
    ends = []
    for make in (lambda p: AdamW(p, eps=1e-14), lambda p: StableSPAM(p, gammas=(0, 0, 0), eps=1e-14)):
        p = torch.nn.Parameter(torch.ones(6, 8, dtype=torch.float64))
        optimizer = make([p])
        for t in range(10):
            p.grad = grad((6, 8), t)
            if not ends:
                p.grad /= p.grad.norm()
            optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reset", ["exact", "reference"])
def test_the_gradient_keeps_its_bits_and_others_their_count(reset):
    """Counts are of a tensor's own steps: one without a gradient stays, and its reset comes later."""
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = StableSPAM(params, gap=3, reset=reset)
    for t in range(3):
        given = grad((4, 3), t).float()
        params[0].grad, params[1].grad = given.clone(), None if t == 1 else given.clone()
        still = params[1].detach().clone()
        optimizer.step()
        assert torch.equal(params[0].grad, given) and torch.equal(params[1], still) == (t == 1)
    assert [int(optimizer.state[p]["start"]) for p in params] == [2, 0]


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (4, 0), (300, 1)])
def test_odd_shapes_and_sizes_stay_finite(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = StableSPAM([p], gap=2)
    for scale in (0.0, 1e-30, 1e10, 0.0, 1.0):
        p.grad = grad(shape, 0).float() * scale
        optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("kept", ["fp32", "bf16", "8bit"])
def test_state_of_any_kind_is_the_declared_one_before_and_after_a_reset(kept):
    p = torch.nn.Parameter(torch.ones(40, 16, dtype=torch.bfloat16))
    optimizer = StableSPAM([p], gap=3, state_dtype=kept)
    for t in range(5):
        p.grad = grad((40, 16), t).bfloat16()
        optimizer.step()
        assert {key: (tuple(v.shape), v.dtype) for key, v in optimizer.state[p].items()} == optimizer.spec(
            (40, 16), p.dtype
        )
        assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
    assert p.isfinite().all()
