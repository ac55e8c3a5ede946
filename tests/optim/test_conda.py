"""Conda against its equations in float64, a recorded trajectory, and GaLore of the whole rank."""

import math

import numpy as np
import pytest
import torch

from tests.tools.trajectories import follow, recorded, split
from thriftlab.optim import Conda, predicted_state_bytes, state_bytes

SHAPES = {"tall": (7, 5), "wide": (4, 6), "square": (5, 5), "bias": (4,)}
GAP, STEPS = 4, 14
HYPER = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, gap=GAP, scale=0.3)


def problem():
    rng = np.random.default_rng(0)
    params = {name: torch.nn.Parameter(torch.tensor(rng.normal(size=shape))) for name, shape in SHAPES.items()}
    return params, [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]


class Reference:
    """One tensor in numpy, its first moment in the space of the matrix."""

    def __init__(self, weight):
        self.w, self.m, self.v, self.k = weight.detach().numpy().copy(), 0.0, 0.0, 0

    def step(self, g):
        (b1, b2), lr, matrix = HYPER["betas"], HYPER["lr"], g.ndim == 2
        self.m = b1 * self.m + (1 - b1) * g
        if matrix and self.k % GAP == 0:
            u, _, vt = np.linalg.svd(self.m, full_matrices=False)
            self.q = (np.eye(len(g)), vt.T) if g.shape[0] >= g.shape[1] else (u, np.eye(g.shape[1]))
        left, right = self.q if matrix else (1.0, 1.0)
        down = (lambda x: left.T @ x @ right) if matrix else (lambda x: x)
        up = (lambda x: left @ x @ right.T) if matrix else (lambda x: x)
        self.k += 1
        self.v = b2 * self.v + (1 - b2) * down(g) ** 2
        n = math.sqrt(1 - b2**self.k) / (1 - b1**self.k) * down(self.m) / (np.sqrt(self.v) + HYPER["eps"])
        self.w = self.w - lr * (HYPER["scale"] if matrix else 1.0) * up(n)
        self.w = (1 - lr * HYPER["weight_decay"]) * self.w


def test_is_its_equations_in_float64():
    params, grads = problem()
    optimizer, references = Conda(params.items(), **HYPER), {name: Reference(p) for name, p in params.items()}
    for t, step in enumerate(grads):
        for name, p in params.items():
            p.grad = torch.tensor(step[name])
        optimizer.step()
        for name, reference in references.items():
            reference.step(step[name])
            assert np.allclose(params[name].detach().numpy(), reference.w, rtol=0, atol=1e-9), (name, t)


def test_follows_the_recorded():
    assert follow(recorded("conda_gap10"), lambda params: Conda(split(params), lr=0.01, gap=10)) < 5e-4 * 0.01


def test_a_first_moment_that_has_overflowed_spans_what_is_left():
    """The search for singular vectors does not fail on it."""
    p = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = Conda([p], gap=2)
    for t in range(5):
        p.grad = torch.full((5, 3), torch.nan) if t == 1 else torch.ones(5, 3)
        optimizer.step()
    assert optimizer.state[p]["basis.vectors"].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (300, 1), (1, 300), (6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", ["fp32", "bf16", "8bit"])
def test_odd_shapes_stay_finite_and_state_is_as_declared(shape, dtype, kept):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = Conda([p], gap=2, state_dtype=kept)
    for scale in (0.0, 1e-20, 1.0, 0.0, 1e10, 1.0):
        p.grad = torch.ones(shape, dtype=dtype) * scale
        optimizer.step()
    assert p.isfinite().all() and state_bytes(optimizer) == predicted_state_bytes(optimizer)
