"""Muon against `torch.optim.Muon` to the bit, and its iteration against the post's formula in float64."""

import math

import numpy as np
import pytest
import torch

from tests.tools.methods import gradient, parameters
from thriftlab.optim import AdamW, Muon
from thriftlab.optim.muon import orthogonalise
from thriftlab.optim.state.storage import load

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(6, 8), (8, 6), (4, 4), (1, 5), (9, 1), (40, 24)]
HYPER = dict(lr=0.02, weight_decay=0.1, momentum=0.9)


def grad(shape, t):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * t + sum(shape) + 7 * shape[0]))


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torchs_to_the_bit_at_every_step(nesterov, adjust):
    ours, theirs = ([torch.nn.Parameter(grad(shape, -1)) for shape in SHAPES] for _ in range(2))
    hyper = dict(nesterov=nesterov, adjust_lr_fn=adjust, ns_coefficients=(3.4, -4.7, 2.0), ns_steps=4, eps=1e-6)
    optimizer, peer = Muon(ours, **HYPER, **hyper), torch.optim.Muon(theirs, **HYPER, **hyper)
    for t in range(12):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = grad(p.shape, t) if t != 3 else torch.zeros(p.shape)
            q.grad = p.grad.clone()
        optimizer.step()
        peer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(optimizer.state[p]["momentum_buffer"], peer.state[q]["momentum_buffer"])


def test_the_defaults_are_torchs():
    ours, theirs = (torch.nn.Parameter(grad((8, 6), 0)) for _ in range(2))
    for p, optimizer in ((ours, Muon([ours])), (theirs, torch.optim.Muon([theirs]))):
        p.grad = grad((8, 6), 1)
        optimizer.step()
    assert torch.equal(ours, theirs)


def reference(matrix, steps, eps=1e-7):
    """The post's iteration on singular values: x <- a x + b x^3 + c x^5, from x / ||X||_F."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / max(np.sqrt((matrix**2).sum()), eps)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ vt, s


@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_is_the_posts_in_float64_and_near_it_in_fp32(shape):
    matrix = np.random.default_rng(3).normal(size=shape)
    want, values = reference(matrix, 5)
    got = orthogonalise(torch.tensor(matrix), COEFFICIENTS, 5, 1e-7)
    # five steps: the slope at zero amplifies a rounding by at most 3.4445^5 = 485, the sums have some 100 terms
    assert np.abs(got.numpy() - want).max() < 485 * 100 * 2**-53
    single = orthogonalise(torch.tensor(matrix).float(), COEFFICIENTS, 5, 1e-7)
    assert single.dtype == torch.float32 and np.abs(single.numpy() - want).max() < 485 * 100 * 2**-24
    assert values.max() < 1.3, "none above the maximum of the map"


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (40, 24)])
def test_a_step_in_float64_is_the_papers(shape, nesterov, adjust):
    p = torch.nn.Parameter(grad(shape, -1).double())
    optimizer = Muon([p], iteration="fp32", nesterov=nesterov, adjust_lr_fn=adjust, split_lr_scale=0.5, **HYPER)
    w, momentum, mu = p.detach().numpy().copy(), 0.0, HYPER["momentum"]
    for t in range(10):
        p.grad = grad(shape, t).double()
        optimizer.step()
        g = p.grad.numpy()
        momentum = mu * momentum + (1 - mu) * g
        update, _ = reference((1 - mu) * g + mu * momentum if nesterov else momentum, 5)
        m, n = shape
        ratio = math.sqrt(max(1, m / n)) if adjust == "original" else 0.2 * math.sqrt(max(m, n))
        w = (1 - HYPER["lr"] * HYPER["weight_decay"]) * w - HYPER["lr"] * 0.5 * ratio * update
        assert np.abs(p.detach().numpy() - w).max() < (t + 1) * 485 * 100 * 2**-53


def test_what_is_not_split_is_adamws():
    ours, theirs = parameters(), parameters()
    matrices = [name for name, p in ours.items() if p.ndim == 2]
    muon = Muon(ours.items(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), adam_eps=1e-3)
    adamw = AdamW(theirs.items(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
    for t in range(5):
        for params, optimizer in ((ours, muon), (theirs, adamw)):
            for name, p in params.items():
                p.grad = gradient(name, t)
            optimizer.step()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) == (name not in matrices)


@pytest.mark.parametrize(("kept", "near"), [("bf16", 0.03), ("8bit", 0.1)])
def test_bf16_parameters_keep_an_exact_momentum_and_small_ones_stay_near(kept, near):
    """The momentum's distance from float64, relative to its norm."""
    for state_dtype, bound in (("fp32", 1e-5), (kept, near)):
        p = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.bfloat16))
        optimizer, exact = Muon([p], state_dtype=state_dtype), 0.0
        for t in range(50):
            p.grad = grad((16, 16), t).bfloat16()
            exact = 0.95 * exact + 0.05 * p.grad.double()
            optimizer.step()
        error = (load(optimizer.state[p], "momentum_buffer").double() - exact).norm() / exact.norm()
        assert (error < bound) and (state_dtype == "fp32" or error > 1e-5)
