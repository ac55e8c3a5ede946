"""SubTrack++ against its equations in float64, a recorded trajectory, and Fira, which it is where nothing turns."""

import math

import numpy as np
import pytest
import torch

from tests.tools.trajectories import follow, recorded, split
from thriftlab.optim import Fira, SubTrack
from thriftlab.optim.state import dense
from thriftlab.optim.state.asking import in_step
from thriftlab.optim.state.carry import estimated

SHAPES = {"tall": (7, 5), "wide": (4, 6), "square": (5, 5), "bias": (4,)}
RANK, GAP, STEPS = 2, 4, 15
HYPER = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, rank=RANK, gap=GAP, alpha=0.3, gamma=1.05)


def tracked(*args):
    return in_step([dense.tracked(*args)])[0]


def problem():
    rng = np.random.default_rng(0)
    params = {name: torch.nn.Parameter(torch.tensor(rng.normal(size=shape))) for name, shape in SHAPES.items()}
    grads = [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]
    return params, grads


def turned(s, g, step_size):
    """One step of descent on |G - S A|^2 along the leading direction; s [q, r], g [q, n]."""
    a = np.linalg.lstsq(s, g, rcond=None)[0]
    slope = -2 * (g - s @ a) @ a.T
    u, sigma, vt = np.linalg.svd(slope)
    u, v, angle = u[:, :1], vt[:1].T, step_size * sigma[0]
    return (s @ v * math.cos(angle) - u * math.sin(angle)) @ v.T + s @ (np.eye(len(v)) - v @ v.T)


class Reference:
    """One tensor in numpy, wide: a tall one is transposed; by the paper, or as the released code goes."""

    def __init__(self, weight, step_size, form):
        self.form = form
        w = weight.detach().numpy().copy()
        self.transposed = w.ndim == 2 and w.shape[0] >= w.shape[1]
        self.w, self.step_size, self.s, self.last, self.t = w.T if self.transposed else w, step_size, None, None, 0
        self.m = self.v = 0.0

    def adam(self, r):
        (b1, b2), self.t = HYPER["betas"], self.t + 1
        self.m, self.v = b1 * self.m + (1 - b1) * r, b2 * self.v + (1 - b2) * r * r
        correction = math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        return correction * self.m / (np.sqrt(self.v) + HYPER["eps"])

    def refresh(self, g):
        if self.s is None:
            self.s = self.first = np.linalg.svd(g)[0][:, :RANK]
            return
        if self.form == "reference":
            change = self.s.T @ self.first
            self.v = (1 - HYPER["betas"][1]) * abs(change**2 @ (self.v - self.m**2) + (change @ self.m) ** 2)
            self.m = change @ self.m
            if not self.transposed:
                self.s = turned(self.s, g, self.step_size)
            return
        old, self.s = self.s, turned(self.s, g, self.step_size)
        change, (k1, k2) = self.s.T @ old, (1 - beta**self.t for beta in HYPER["betas"])
        mean, mean_sq = self.m / k1, self.v / k2
        self.v = k2 * abs(change**2 @ (mean_sq - mean**2) + (change @ mean) ** 2)
        self.m = change @ self.m

    def limited(self, rest):
        if self.last is not None:
            rest = rest / (max(np.linalg.norm(rest) / (self.last + 1e-8), HYPER["gamma"]) / HYPER["gamma"])
        self.last = np.linalg.norm(rest)
        return rest

    def step(self, g):
        lr, norm = HYPER["lr"], np.linalg.norm
        if g.ndim == 1:
            self.w = (1 - lr * HYPER["weight_decay"]) * (self.w - lr * self.adam(g))
            return
        g = g.T if self.transposed else g
        if self.t % GAP == 0:
            self.refresh(g)
        r = self.s.T @ g
        n = self.adam(r)
        if self.form == "reference":
            correction = math.sqrt(1 - HYPER["betas"][1] ** self.t) / (1 - HYPER["betas"][0] ** self.t)
            n = n / correction
            rest = self.limited((g - HYPER["alpha"] * self.s @ r) * norm(n, axis=0) / (norm(r, axis=0) + 1e-8))
            self.w = self.w - lr * correction * (HYPER["alpha"] * self.s @ n + rest)
            self.w = (1 - lr * HYPER["weight_decay"]) * self.w
            return
        rest = self.limited((g - self.s @ r) * norm(n, axis=0) / (norm(r, axis=0) + 1e-8))
        self.w = (1 - lr * HYPER["weight_decay"]) * (self.w - lr * HYPER["alpha"] * (self.s @ n + rest))


@pytest.mark.parametrize("form", ["exact", "reference"])
@pytest.mark.parametrize("step_size", [0.0, 0.01, 1.0])
def test_is_its_equations_in_float64(step_size, form):
    params, grads = problem()
    optimizer = SubTrack(params.items(), step_size=step_size, form=form, **HYPER)
    references = {name: Reference(p, step_size, form) for name, p in params.items()}
    for t, step in enumerate(grads):
        for name, p in params.items():
            p.grad = torch.tensor(step[name])
        optimizer.step()
        for name, reference in references.items():
            reference.step(step[name])
            want = reference.w.T if reference.transposed else reference.w
            assert np.allclose(params[name].detach().numpy(), want, rtol=1e-9, atol=1e-9), (name, t)


def test_follows_the_recorded():
    record = recorded("subtrack_exact")
    assert follow(record, lambda p: SubTrack(split(p), lr=1e-3, rank=4, gap=10, step_size=0.5)) < 2e-3 * 1e-3


def test_where_nothing_turns_it_is_fira():
    """In the first basis for ever: moments are kept, and so are their corrections."""
    ends = []
    for make in (lambda p: SubTrack(p, step_size=0.0, **HYPER),
                 lambda p: Fira(p, residual="exact", **{**HYPER, "gap": 1000})):  # fmt: skip
        params, grads = problem()
        optimizer = make(params.items())
        for step in grads:
            for name, p in params.items():
                p.grad = torch.tensor(step[name])
            optimizer.step()
        ends.append(params)
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-12) for name in SHAPES)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
def test_a_small_turn_is_descent_and_large_ones_stay_orthonormal(shape):
    rng = np.random.default_rng(1)
    grad, s = torch.tensor(rng.normal(size=shape)), torch.tensor(np.linalg.qr(rng.normal(size=(20, 4)))[0])

    def missed(s):
        tall = grad if shape[0] >= shape[1] else grad.T
        return float((tall - tall @ s @ s.T).square().sum())

    errors = [missed(s)]
    for step_size in (1e-4, 1e-4, 1e-4):
        s = tracked(s, grad, step_size)
        errors.append(missed(s))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    small = s.bfloat16()
    for _ in range(50):
        s, small = tracked(s, grad, 1e4), tracked(small, grad.bfloat16(), 1e-3)
    assert torch.allclose(s.T @ s, torch.eye(4).double(), rtol=0, atol=1e-12)
    assert torch.allclose((small.T @ small).float(), torch.eye(4), rtol=0, atol=0.02), "to the rounding of bf16"


@pytest.mark.parametrize("form", ["exact", "reference"])
def test_subspaces_follow_in_every_shape(form):
    """By the paper; the released code keeps the first basis of square and tall matrices."""
    params, grads = problem()
    optimizer = SubTrack(params.items(), step_size=0.05, form=form, **HYPER)
    first = {}
    for step in grads:
        for name, p in params.items():
            p.grad = torch.tensor(step[name])
        optimizer.step()
        if not first:
            first = {name: optimizer.state[p]["basis.vectors"].clone() for name, p in params.items() if p.ndim == 2}
    for name, basis in first.items():
        shared = torch.linalg.svdvals(basis.T @ optimizer.state[params[name]]["basis.vectors"])
        assert (shared.min() < 0.99) == (form == "exact" or name == "wide"), name


@pytest.mark.parametrize("rows", [True, False])
def test_moments_in_the_same_basis_stay(rows):
    rng = np.random.default_rng(2)
    first, second = torch.tensor(rng.normal(size=(5, 5))), torch.tensor(rng.normal(size=(5, 5))).square()
    second = second + 1000 * first.square()  # no mean of squares is below the square of a mean
    age = torch.tensor(3, dtype=torch.float64)
    same = estimated(first, second, torch.eye(5).double(), rows, age, (0.9, 0.999))
    assert torch.equal(same[0], first) and torch.allclose(same[1], second, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 5), (300, 3), (3, 300)])
def test_odd_shapes_and_gradients_stay_finite(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = SubTrack([p], rank=2, gap=2)
    for scale in (0.0, 1e-20, 1.0, 0.0, 1e10, 1.0):
        p.grad = torch.ones(shape) * scale
        optimizer.step()
    assert p.isfinite().all()
