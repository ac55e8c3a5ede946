"""RMNP against a float64 oracle written from its algorithm, against a trajectory of its code, and beside SCALE."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.tools.peers import farthest, groups_of
from thriftlab.optim import RMNP, Scale, split_groups
from thriftlab.optim.core.listing import listing
from thriftlab.train.model import GPT, ModelConfig

SHAPES = {"embed": (17, 6), "q": (6, 6), "up": (9, 6), "down": (6, 9), "norm": (6,), "head": (17, 6)}
LR, DECAY = 0.02, 0.1


def gradient(name, step):
    rng = np.random.default_rng(100 * step + list(SHAPES).index(name))
    grad = rng.normal(size=SHAPES[name]) * 10.0 ** rng.integers(-4, 3)
    if name == "embed":
        grad[rng.permutation(len(grad))[:9]] = 0.0
    return grad


def oracle(name, w, steps, own, *, beta=0.8, mu=None, adjust=False, betas=(0.7, 0.9), eps=1e-10, reference=False):
    """The weight after each step; `mu` where the code looks ahead; `own`: whether the row rule is its."""
    buffer = m = v = np.zeros_like(w)
    (b1, b2), found = betas, []
    for k, g in enumerate((gradient(name, step) for step in range(steps)), 1):
        if own:
            buffer = beta * buffer + (1 - beta) * g
            u = buffer if mu is None else (1 - mu) * g + mu * buffer
            factor = max(1.0, math.sqrt(w.shape[0] / w.shape[1])) if adjust else 1.0
            rows = [row / max(math.sqrt(sum(x * x for x in row)), 1e-12) for row in u]
            w = (1 - LR * DECAY) * w - LR * factor * np.array(rows)
        else:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            correction = math.sqrt(1 - b2**k) / (1 - b1**k)
            w = (1 - LR * DECAY * (correction if reference else 1.0)) * w
            w = w - 3 * LR * correction * m / (np.sqrt(v) + eps)
        found.append(w)
    return found


WAYS = {
    "paper": ({}, {}),
    "code": (
        {"nesterov": True, "momentum": 0.6, "adjust_lr": True, "plain_decay": "reference"},
        {"mu": 0.6, "adjust": True, "reference": True},
    ),
    "one decay": ({"nesterov": True}, {"mu": 0.8}),
}


@pytest.mark.parametrize("tables", ["adamw", "own"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_in_float64_is_the_papers(way, tables):
    ours, theirs = WAYS[way]
    params = {name: nn.Parameter(torch.tensor(gradient(name, 99))) for name in SHAPES}
    hyper = dict(lr=LR, weight_decay=DECAY, beta=0.8, plain_lr_scale=3.0, betas=(0.7, 0.9), tables=tables)
    optimizer = RMNP(groups_of(params), **hyper, **ours)
    own = {n for n in SHAPES if n != "norm" and (tables == "own" or n not in ("embed", "head"))}
    want = {n: oracle(n, p.detach().numpy().copy(), 20, n in own, **theirs) for n, p in params.items()}
    for step in range(20):
        for name, p in params.items():
            p.grad = torch.tensor(gradient(name, step))
        optimizer.step()
        for name, p in params.items():
            assert np.allclose(p.detach().numpy(), want[name][step], rtol=1e-12, atol=1e-12), (step, name)
    kept = {n for n, p in params.items() if "momentum_buffer" in optimizer.state[p]}
    assert kept == own and all("exp_avg" in optimizer.state[p] for n, p in params.items() if n not in own)


def test_the_trajectory_of_the_published_code():
    hyper = dict(lr=5e-3, nesterov=True, adjust_lr=True, plain_decay="reference")
    far = farthest("rmnp_llama", lambda params: RMNP(groups_of(params), **hyper), lr=5e-3)
    assert max(far.values()) <= 5e-4, far


def test_without_momentum_and_at_sqrt_n_times_the_lr_a_square_matrix_is_scales():
    """And in SCALE's other length at the same lr, whatever the shape."""
    for shape, length, factor in (((6, 6), "rms", 6**0.5), ((6, 9), "norm", 1.0)):
        ours, theirs = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
        rmnp = RMNP([ours], lr=0.1 * factor, beta=0.0, nesterov=True, adjust_lr=True, weight_decay=0.0)
        scale = Scale([theirs], lr=0.1, length=length, weight_decay=0.0)
        for step in range(5):
            ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            theirs.grad = ours.grad.clone()
            rmnp.step()
            scale.step()
        assert torch.allclose(ours, theirs, rtol=1e-14, atol=1e-14)


def test_the_sum_of_the_package_is_the_mean_of_the_paper():
    """B <- mu B + G, U = G + mu B is 1 / (1 - mu) times the same, and a row is divided by its length."""
    p, mu, buffer = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64)), 0.95, 0.0
    optimizer, w = RMNP([p], lr=0.1, beta=mu, nesterov=True, weight_decay=0.0), torch.zeros_like(p)
    for step in range(9):
        p.grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        buffer = mu * buffer + p.grad
        u = p.grad + mu * buffer
        w = w - 0.1 * u / u.norm(dim=1, keepdim=True)
        optimizer.step()
        assert torch.allclose(p, w, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (1, 7), (7, 1), (5, 3), (700, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hostile_shapes_and_rows(dtype, shape, nesterov):
    """Rows of length 1 but those of zeros, which stay; a NaN stays in its row."""
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = RMNP([p], lr=1.0, weight_decay=0.0, nesterov=nesterov)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if min(shape) > 1:
        grad[0] = 0.0
        grad[1, 0] = torch.nan
    p.grad = grad.clone()
    optimizer.step()
    got = p.detach().double()
    if min(shape) > 1:
        assert not got[0].any() and got[1].isnan().all()
        got, grad = got[2:], grad[2:]
    if min(shape):
        want = -grad.double() / grad.double().norm(dim=1, keepdim=True)
        assert torch.allclose(
            got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 if dtype != torch.float64 else 1e-14
        )


def test_who_steps_the_tables_is_said():
    sizes = ModelConfig(preset=None, dim=8, layers=2, heads=2, hidden=12, vocab_size=19)
    for tables, left in (("adamw", "7 of 21"), ("own", "5 of 21")):
        said = listing(RMNP(split_groups(GPT(sizes), ["attn|mlp"], roles=True), tables=tables))
        assert left in said and said.count("\n") == 0
