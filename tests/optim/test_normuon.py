"""NorMuon against its equations in float64, the authors' file, and what it has in common with Muon."""

import math

import numpy as np
import pytest
import torch

from tests.tools.trajectories import follow, recorded, split
from thriftlab.optim import Muon, NorMuon, predicted_state_bytes, state_bytes

SHAPES = [(6, 8), (8, 6), (5, 5), (1, 5), (9, 1), (40, 24)]
HYPER = dict(lr=0.02, weight_decay=0.1, momentum=0.9, beta2=0.8)
COEFFICIENTS = 3.4445, -4.7750, 2.0315


def grad(shape, t):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * t + sum(shape) + 7 * shape[0]))


def newton_schulz(matrix):
    """Five steps of the iteration, on singular values."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / max(np.sqrt((matrix**2).sum()), 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


class Reference:
    """The paper's algorithm, or the authors' file, for one matrix in float64."""

    def __init__(self, weight, form):
        self.w, self.form = weight.detach().numpy().copy(), form
        self.momentum, self.v = np.zeros_like(self.w), np.zeros(len(self.w))

    def step(self, g):
        mu, b2, lr, (m, n) = HYPER["momentum"], HYPER["beta2"], HYPER["lr"], g.shape
        self.momentum = mu * self.momentum + (1 - mu) * g
        o = newton_schulz((1 - mu) * g + mu * self.momentum if self.form == "reference" else self.momentum)
        self.v = b2 * self.v + (1 - b2) * (o**2).mean(1)
        p = o / (np.sqrt(self.v) + 1e-10)[:, None]
        length = 0.2 * math.sqrt(m * n)
        if self.form == "reference":
            length = math.sqrt(max(1, m / n)) * np.linalg.norm(o)
        self.w = (1 - lr * HYPER["weight_decay"]) * self.w - lr * length * p / np.linalg.norm(p)


@pytest.mark.parametrize("form", ["exact", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_papers_in_float64(shape, form):
    p = torch.nn.Parameter(grad(shape, -1).double())
    optimizer, reference = NorMuon([p], form=form, iteration="fp32", **HYPER), Reference(p, form)
    for t in range(12):
        p.grad = grad(shape, t).double()
        optimizer.step()
        reference.step(p.grad.numpy())
        # roundings grow by the iteration's slope at zero, 485, and a row's share of |P| by at most sqrt(m)
        assert np.abs(p.detach().numpy() - reference.w).max() < (t + 1) * 485 * 1000 * 2**-53
        assert np.allclose(optimizer.state[p]["exp_avg_sq_row"].numpy(), reference.v, rtol=1e-9, atol=0)


def test_follows_the_authors_file():
    record = recorded("normuon_ns_fp32")
    far = follow(
        record,
        lambda params: NorMuon(split(params, lr=3e-4), lr=0.02, weight_decay=0.0, form="reference", iteration="fp32"),
    )
    assert far < 5e-4 * 0.02


@pytest.mark.parametrize("form", ["exact", "reference"])
def test_with_one_row_it_is_muon(form):
    """Of one row all that is left of v is the norm: as long as O, or as an orthogonal matrix."""
    ours, theirs = (torch.nn.Parameter(grad((1, 6), -1).double()) for _ in range(2))
    both = dict(lr=0.02, weight_decay=0.1, iteration="fp32")
    muon = Muon([theirs], nesterov=form == "reference", adjust_lr_fn={"exact": "match_rms_adamw"}.get(form), **both)
    normuon = NorMuon([ours], form=form, **both)
    for t in range(6):
        before = ours.detach().clone(), theirs.detach().clone()
        for p, optimizer in ((ours, normuon), (theirs, muon)):
            p.grad = grad((1, 6), t).double()
            optimizer.step()
        if form == "reference":
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
        else:
            steps = [p.detach() - (1 - 0.02 * 0.1) * old for p, old in zip((ours, theirs), before, strict=True)]
            assert torch.allclose(*(step / step.norm() for step in steps), rtol=0, atol=1e-12)
            assert math.isclose(float(steps[0].norm()), 0.02 * 0.2 * math.sqrt(6), rel_tol=1e-12)


@pytest.mark.parametrize("form", ["exact", "reference"])
def test_rows_without_a_gradient_stay(form):
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = NorMuon([p], form=form, weight_decay=0.0, iteration="fp32")
    for t in range(4):
        p.grad = grad((4, 3), t)
        p.grad[1] = 0
        optimizer.step()
    assert torch.equal(p[1], torch.ones(3)) and not torch.equal(p[0], torch.ones(3))
    still = p.detach().clone()
    other = NorMuon([p], form=form, weight_decay=0.0)
    p.grad = torch.zeros(4, 3)
    other.step()
    assert torch.equal(p, still)
    p.grad = None
    optimizer.step()
    assert torch.equal(p, still), "a missing gradient is not one of zeros"


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (300, 1), (1, 300)])
def test_odd_shapes_stay_finite(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = NorMuon([p])
    for t in range(3):
        p.grad = grad(shape, t) * 1e-20
        optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", ["fp32", "bf16", "8bit"])
def test_row_moments_are_wide_whatever_the_state(kept, dtype):
    p = torch.nn.Parameter(torch.ones(6, 4, dtype=dtype))
    optimizer = NorMuon([p], state_dtype=kept)
    p.grad = grad((6, 4), 0).to(dtype)
    optimizer.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.state[p]["exp_avg_sq_row"].dtype == wide
    assert state_bytes(optimizer) == predicted_state_bytes(optimizer)


def test_the_state_of_muon_is_refused():
    p = torch.nn.Parameter(torch.ones(6, 4))
    p.grad = grad((6, 4), 0)
    muon = Muon([p])
    muon.step()
    with pytest.raises(ValueError, match="state of another method"):
        NorMuon([p]).load_state_dict(muon.state_dict())
