"""SinkGD by passes over rows and columns in float64, SWAN by singular vectors, trajectories, and odd matrices."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.tools.peers import AFTER, GOLDEN, STEPS, farthest, groups_of
from thriftlab.optim import SinkGD
from thriftlab.optim.core.normalised import sinkhorn

HYPER = dict(lr=0.02, weight_decay=0.1)
SHAPES = [(6, 6), (9, 6), (6, 9), (1, 5), (5, 1), (40, 24)]


def normal(shape, step, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + sum(shape)), dtype=dtype)


def by_passes(g, iterations):
    """As the paper writes it; a row or column of zeros stays."""
    x, (m, n) = np.array(g), g.shape
    for _ in range(iterations):
        for i in range(m):
            x[i] *= np.sqrt(n) / max(np.sqrt((x[i] ** 2).sum()), 1e-30)
        for j in range(n):
            x[:, j] *= np.sqrt(m) / max(np.sqrt((x[:, j] ** 2).sum()), 1e-30)
    return x


def by_singular_vectors(g, center):
    x = np.array(g)
    x = x - x.mean(1, keepdims=True) if center else x
    x = x / np.sqrt((x**2).mean(1, keepdims=True))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = (s > 1e-9 * s[0]).sum()
    polar = u[:, :rank] @ vt[:rank]
    return polar * np.sqrt((x**2).sum() / (polar**2).sum())


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_in_float64_is_the_papers(shape, iterations):
    p = nn.Parameter(normal(shape, 99))
    optimizer, w = SinkGD([p], iterations=iterations, split_lr_scale=0.5, **HYPER), p.detach().numpy().copy()
    for step in range(8):
        p.grad = normal(shape, step) * 10.0 ** (step - 4)
        optimizer.step()
        w = (1 - 0.02 * 0.1) * w - 0.02 * 0.5 * by_passes(p.grad.numpy(), iterations)
        assert np.allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(6, 6), (9, 6), (6, 9), (40, 24)])
def test_a_step_of_swan_in_float64_is_the_papers(shape, center):
    p = nn.Parameter(normal(shape, 99))
    optimizer = SinkGD([p], whiten=True, center=center, ns_steps=30, split_lr_scale=0.5, **HYPER)
    w = p.detach().numpy().copy()
    for step in range(5):
        p.grad = normal(shape, step)
        optimizer.step()
        w = (1 - 0.02 * 0.1) * w - 0.02 * 0.5 * by_singular_vectors(p.grad.numpy(), center)
        assert np.allclose(p.detach().numpy(), w, rtol=1e-6, atol=1e-6)


def test_the_trajectory_of_the_equations():
    far = farthest("sinkgd_L5", lambda params: SinkGD(groups_of(params), lr=0.01), lr=0.01)
    assert max(far.values()) <= 5e-4, far


def test_the_trajectory_of_swan_where_its_direction_is_no_accident():
    """A centred matrix that is not wide has a null direction; there the trajectory has what the decomposition gave."""
    far = farthest("swan", lambda params: SinkGD(groups_of(params), lr=0.01, whiten=True), lr=0.01)
    assert all(far[name] <= 5e-4 for name in far if name not in ("q", "o", "up")), far


def test_the_trajectory_of_swan_outside_of_the_null_direction():
    """Rows of a centred matrix sum to 0, so with n <= m its rank is n - 1. The trajectory's polar factor has one
    more direction, which moves each row along a vector of ones; so its norm is sqrt(n), and not sqrt(n - 1)."""
    with np.load(GOLDEN / "swan.npz") as file:
        golden = dict(file)
    names = ("q", "o", "up")
    params = {name: nn.Parameter(torch.tensor(golden[f"init/{name}"])) for name in names}
    optimizer = SinkGD(groups_of(params), lr=0.01, whiten=True)
    for step in range(STEPS):
        for name, p in params.items():
            p.grad = torch.tensor(golden[f"grad/{name}"][step])
        optimizer.step()
        for name, p in params.items():
            if step in AFTER:
                start, n = golden[f"init/{name}"], p.shape[1]
                ours, theirs = p.detach().numpy() - start, golden[f"param/{name}"][AFTER.index(step)] - start
                centred = theirs - theirs.mean(1, keepdims=True)
                assert np.abs(ours - centred / np.sqrt((n - 1) / n)).max() <= 5e-4 * 0.01, (name, step)
                assert np.abs(ours.mean(1)).max() <= 5e-4 * 0.01, "nothing along the ones"


def test_factors_are_the_passes_in_fp32():
    for shape in SHAPES:
        grad = normal(shape, 0, torch.float32) * 1e-12  # whose squares underflow
        [(rows, columns, _)] = sinkhorn([grad], 5)
        want = by_passes(grad.double().numpy(), 5)
        assert np.allclose((grad * rows * columns).numpy(), want, rtol=2e-5, atol=2e-5), shape


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (1, 7), (7, 1), (5, 4), (70, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hostile_shapes_zero_rows_and_columns(dtype, shape, whiten):
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = SinkGD([p], lr=1.0, split_lr_scale=1.0, whiten=whiten, center=False)
    p.grad = normal(shape, 0, torch.float32).to(dtype)
    if min(shape) > 1:
        p.grad[0] = 0.0
        p.grad[:, 1] = 0.0
    optimizer.step()
    assert p.isfinite().all()
    if min(shape) > 1:
        assert not p[0].any() and not p[:, 1].any() and p.any()
        if not whiten:
            want = by_passes(-p.grad.double().numpy(), 5)
            near = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
            assert np.allclose(p.detach().double().numpy(), want, rtol=near, atol=near)
    p.grad.zero_()
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before), "a gradient of zeros does not move"


def test_a_nan_does_not_leave_its_matrix():
    ours = {name: nn.Parameter(torch.ones(4, 4)) for name in "ab"}
    optimizer = SinkGD(ours.items(), weight_decay=0.0)
    for p in ours.values():
        p.grad = torch.ones(4, 4)
    ours["a"].grad[2, 2] = torch.nan
    optimizer.step()
    assert ours["a"].isnan().any() and ours["b"].isfinite().all()


def test_matrices_have_no_state_and_the_rest_is_adamws():
    params = {
        name: nn.Parameter(torch.zeros(shape)) for name, shape in (("q", (6, 6)), ("head", (17, 6)), ("norm", (6,)))
    }
    optimizer = SinkGD(groups_of(params), state_dtype="bf16")
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    sizes = {name: sum(t.nbytes for t in optimizer.state[p].values() if t.ndim) for name, p in params.items()}
    assert sizes == {"q": 0, "head": 2 * 2 * 102, "norm": 2 * 2 * 6}
