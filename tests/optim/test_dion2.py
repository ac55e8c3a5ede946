"""Dion2 against its equations in float64, a recorded trajectory of its code, and Muon, which it is with all slices."""

import math

import numpy as np
import pytest
import torch

from tests.tools.trajectories import follow, recorded, split
from thriftlab.optim import Dion2, predicted_state_bytes, state_bytes
from thriftlab.optim.dion2 import ITERATIONS

SHAPES = [(6, 8), (8, 6), (5, 5), (1, 5), (9, 1), (40, 24)]
HYPER = dict(lr=0.02, weight_decay=0.1, error_feedback=0.9)
WAYS = [("polar", "spectral_norm", 0.25), ("ns5", "rms_norm", 0.5), ("polar", None, 1.0)]


def grad(shape, t):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * t + sum(shape) + 7 * shape[0]))


class Reference:
    """The algorithm for one matrix in float64; the iteration on singular values."""

    def __init__(self, weight, coefficients, adjust, fraction):
        self.w = weight.detach().numpy().copy()
        self.b, self.way = np.zeros_like(self.w), (coefficients, adjust, fraction)

    def step(self, g):
        (coefficients, adjust, fraction), (m, n) = self.way, g.shape
        self.b = self.b + g
        rows = self.b if m <= n else self.b.T  # a view
        chosen = sorted(range(len(rows)), key=lambda i: -sum(abs(x) for x in rows[i]))
        chosen = chosen[: math.ceil(fraction * len(rows))]
        margin, polynomials = ITERATIONS[coefficients]
        u, s, vt = np.linalg.svd(rows[chosen], full_matrices=False)
        s = s / (margin * math.sqrt(sum(s**2)) + 1e-8)
        for a, b, c in polynomials:
            s = a * s + b * s**3 + c * s**5
        rows[chosen] *= HYPER["error_feedback"]
        factor = {"spectral_norm": math.sqrt(m / n), "rms_norm": 0.2 * math.sqrt(max(m, n)), None: 1.0}[adjust]
        self.w = (1 - HYPER["lr"] * HYPER["weight_decay"]) * self.w
        (self.w if m <= n else self.w.T)[chosen] -= HYPER["lr"] * factor * (u * s @ vt)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_its_equations_in_float64(shape, way):
    p = torch.nn.Parameter(grad(shape, -1).double())
    coefficients, adjust, fraction = way
    how = dict(coefficients=coefficients, adjust_lr_fn=adjust, fraction=fraction)
    optimizer, reference = Dion2([p], iteration="fp32", **how, **HYPER), Reference(p, *way)
    for t in range(12):
        p.grad = grad(shape, t).double()
        optimizer.step()
        reference.step(p.grad.numpy())
        assert np.abs(p.detach().numpy() - reference.w).max() < 1e-9, t  # slopes at zero of five steps: 1300 at most
        assert np.allclose(optimizer.state[p]["momentum_buffer"].numpy(), reference.b, rtol=0, atol=1e-12)


def test_follows_the_code():
    record = recorded("dion2_polar_ns_fp32")
    assert follow(record, lambda params: Dion2(split(params, lr=3e-4), lr=0.02, iteration="fp32")) < 5e-4 * 0.02


def test_with_all_slices_it_is_muon_with_a_heavy_ball():
    """B <- mu (B + G) after the step is B <- mu B + G before it, once more times mu."""
    p, mu, buffer = torch.nn.Parameter(grad((5, 8), -1).double()), 0.9, 0.0
    optimizer = Dion2([p], lr=0.1, fraction=1.0, error_feedback=mu, weight_decay=0.0, iteration="fp32")
    w = p.detach().clone()
    for t in range(8):
        p.grad = grad((5, 8), t).double()
        optimizer.step()
        buffer = mu * buffer + p.grad
        u, s, vt = torch.linalg.svd(buffer, full_matrices=False)
        s = s / (1.02 * s.square().sum().sqrt() + 1e-8)
        for a, b, c in ITERATIONS["polar"][1]:
            s = a * s + b * s**3 + c * s**5
        assert (s - 1).abs().max() < 0.2
        w -= 0.1 * math.sqrt(5 / 8) * u * s @ vt
        assert torch.allclose(p, w, rtol=0, atol=1e-11)


def test_what_is_not_chosen_waits_and_grows():
    """A row that is small in each step is chosen when it has been added up for long enough; then it starts anew."""
    p = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = Dion2([p], fraction=0.25, error_feedback=0.0, weight_decay=0.0)
    seen = []
    for _ in range(7):
        p.grad = torch.ones(4, 6) * torch.tensor([1.0, 0.9, 0.5, 0.0])[:, None]
        before = p.detach().clone()
        optimizer.step()
        seen.append((p != before).any(1).nonzero().flatten().tolist())
    assert seen == [[0], [1], [0], [2], [1], [0], [1]]


@pytest.mark.parametrize("iteration", ["bf16", "fp32"])
def test_rows_without_a_gradient_stay(iteration):
    p = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = Dion2([p], fraction=1.0, weight_decay=0.0, iteration=iteration)
    for t in range(3):
        p.grad = grad((4, 6), t)
        p.grad[1] = 0
        optimizer.step()
    assert torch.equal(p[1], torch.ones(6)) and not torch.equal(p[0], torch.ones(6))
    still, other = p.detach().clone(), Dion2([p], weight_decay=0.0, iteration=iteration)
    p.grad = torch.zeros(4, 6)
    other.step()
    assert torch.equal(p, still)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (300, 1), (1, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", ["fp32", "bf16", "8bit"])
def test_odd_shapes_stay_finite_and_state_is_as_declared(shape, dtype, kept):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = Dion2([p], state_dtype=kept)
    for t in range(3):
        p.grad = (grad(shape, t) * 1e-20).to(dtype)
        optimizer.step()
    assert p.isfinite().all() and state_bytes(optimizer) == predicted_state_bytes(optimizer)
