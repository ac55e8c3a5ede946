"""SOAP against its equations in float64, a recorded trajectory of its code, and Adam, which it is without bases."""

import math

import numpy as np
import pytest
import torch

from tests.tools.trajectories import follow, recorded
from thriftlab.optim import SOAP, predicted_state_bytes, state_bytes

SHAPES = {"tall": (7, 5), "wide": (4, 6), "square": (5, 5), "one side": (12, 3), "none": (12, 11), "bias": (4,)}
GAP, STEPS = 3, 14
HYPER = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, gap=GAP, max_precond_dim=10)
WAYS = {"plain": {}, "other": {"shampoo_beta": 0.7, "normalize_grads": True}}


def problem():
    rng = np.random.default_rng(0)
    params = {name: torch.nn.Parameter(torch.tensor(rng.normal(size=shape))) for name, shape in SHAPES.items()}
    return params, [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]


class Reference:
    """One tensor in numpy, as the published code goes: the first moment leaves its basis in every step."""

    def __init__(self, weight, shampoo_beta=None, normalize_grads=False):
        self.w, self.k = weight.detach().numpy().copy(), 0
        self.s, self.normalize = shampoo_beta or HYPER["betas"][1], normalize_grads
        self.short = [weight.ndim == 2 and n <= HYPER["max_precond_dim"] for n in weight.shape]
        self.means = [np.zeros((n, n)) for n in weight.shape]
        self.bases = [np.eye(n) for n in weight.shape]
        self.m = self.v = 0.0

    def turned(self, x, back=False):
        for axis, (basis, short) in enumerate(zip(self.bases, self.short, strict=True)):
            if short:
                x = np.moveaxis(np.tensordot(x, basis.T if back else basis, axes=(axis, 0)), -1, axis)
        return x

    def observe(self, g):
        for axis in range(g.ndim):
            if self.short[axis]:
                rest = [i for i in range(g.ndim) if i != axis]
                self.means[axis] = self.s * self.means[axis] + (1 - self.s) * np.tensordot(g, g, axes=(rest, rest))

    def step(self, g, first_bases):
        if self.k == 0:
            self.observe(g)
            self.bases = first_bases
            self.k = 1
            return
        (b1, b2), lr = HYPER["betas"], HYPER["lr"]
        p = self.turned(g)
        mean = self.turned(self.m, back=True) if self.k > 1 else np.zeros_like(g)
        self.m = b1 * self.turned(mean) + (1 - b1) * p
        self.v = b2 * self.v + (1 - b2) * p * p
        n = math.sqrt(1 - b2**self.k) / (1 - b1**self.k) * self.m / (np.sqrt(self.v) + HYPER["eps"])
        n = self.turned(n, back=True)
        if self.normalize:
            n = n / math.sqrt((n**2).mean())
        self.w = (1 - lr * HYPER["weight_decay"]) * (self.w - lr * n)
        mean = self.turned(self.m, back=True)
        self.observe(g)
        if self.k % GAP == 0:
            for axis in [axis for axis in range(g.ndim) if self.short[axis]]:
                q, mean_square = self.bases[axis], self.means[axis]
                order = sorted(range(len(q)), key=lambda i: -(q[:, i] @ mean_square @ q[:, i]))
                self.v = np.take(self.v, order, axis)
                self.bases[axis] = np.linalg.qr(mean_square @ q[:, order])[0]
        self.m = self.turned(mean)
        self.k += 1


def bases_of(optimizer, p):
    state = optimizer.state[p]
    kept = [state.get(f"basis.{side}") for side in ("left", "right")][: p.ndim]
    return [np.eye(n) if basis is None else basis.numpy().copy() for n, basis in zip(p.shape, kept, strict=True)]


@pytest.mark.parametrize("way", WAYS)
def test_is_its_equations_in_float64(way):
    params, grads = problem()
    optimizer = SOAP(params.items(), **HYPER, **WAYS[way])
    references = {name: Reference(p, **WAYS[way]) for name, p in params.items()}
    for t, step in enumerate(grads):
        for name, p in params.items():
            p.grad = torch.tensor(step[name])
        optimizer.step()
        for name, reference in references.items():
            reference.step(step[name], bases_of(optimizer, params[name]))
            assert np.allclose(params[name].detach().numpy(), reference.w, rtol=0, atol=1e-8), (name, t)


def test_the_first_bases_are_eigenvectors_with_the_largest_first():
    params, grads = problem()
    optimizer = SOAP(params.items(), **HYPER)
    for name, p in params.items():
        p.grad = torch.tensor(grads[0][name])
    optimizer.step()
    for name, p in params.items():
        g, state = grads[0][name], optimizer.state[p]
        assert ("basis.left" in state, "basis.right" in state) == (
            name in ("tall", "wide", "square"),
            name in ("tall", "wide", "square", "one side"),
        )
        for side, square in (("left", g @ g.T), ("right", g.T @ g)) if g.ndim == 2 else ():
            if f"basis.{side}" in state:
                q = state[f"basis.{side}"].numpy()
                values = q.T @ square @ q
                assert np.allclose(q.T @ q, np.eye(len(q)), atol=1e-12)
                assert np.allclose(values, np.diag(np.linalg.eigvalsh(square)[::-1]), atol=1e-12)


def test_follows_the_code_from_its_first_bases():
    record = recorded("soap_freq10")

    def make(params):
        optimizer = SOAP(params.items(), lr=3e-3, max_precond_dim=32)
        begin = optimizer.register_step_post_hook(lambda *_: begin_with(optimizer, params, record, begin))
        return optimizer

    assert follow(record, make) < 5e-4 * 3e-3


def begin_with(optimizer, params, record, handle):
    for name, p in params.items():
        for side in ("left", "right"):
            assert (f"basis.{side}" in optimizer.state[p]) == (f"basis.{side}/{name}" in record)
            if f"basis.{side}" in optimizer.state[p]:
                optimizer.state[p][f"basis.{side}"].copy_(torch.tensor(record[f"basis.{side}/{name}"]))
    handle.remove()


def test_without_bases_it_is_adam_one_step_late():
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 4, dtype=torch.float64)) for _ in range(2))
    late = SOAP([ours], max_precond_dim=0, eps=1e-12, weight_decay=0.0)
    adam = torch.optim.Adam([theirs], lr=3e-3, betas=(0.95, 0.95), eps=0.0)
    for t in range(6):
        ours.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        late.step()
        if t:
            adam.step()
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_what_is_not_split_is_stepped_from_the_first_step_on():
    tables, matrix = torch.nn.Parameter(torch.ones(6, 4)), torch.nn.Parameter(torch.ones(6, 4))
    optimizer = SOAP([{"params": [matrix]}, {"params": [tables], "split": False}])
    matrix.grad = tables.grad = torch.ones(6, 4)
    optimizer.step()
    assert torch.equal(matrix, torch.ones(6, 4)) and not torch.equal(tables, torch.ones(6, 4))


def test_a_first_gradient_that_is_not_finite_is_passed_over():
    runs = []
    for bad in (True, False):
        p = torch.nn.Parameter(torch.ones(6, 4))
        optimizer = SOAP([p], gap=2)
        for t in range(-bad, 5):
            p.grad = torch.full((6, 4), torch.nan)
            if t >= 0:
                p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(t))
            optimizer.step()
            if t < 0:
                assert optimizer.state_dict()["state"].keys() <= {0} and torch.equal(p, torch.ones(6, 4))
        runs.append(p.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (300, 1), (1, 300), (6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", ["fp32", "bf16", "8bit"])
def test_odd_shapes_stay_finite_and_state_is_as_declared(shape, dtype, kept):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = SOAP([p], gap=2, max_precond_dim=20, state_dtype=kept)
    for scale in (0.0, 1e-20, 1.0, 0.0, 1e10, 1.0):
        p.grad = torch.ones(shape, dtype=dtype) * scale
        optimizer.step()
    assert p.isfinite().all() and state_bytes(optimizer) == predicted_state_bytes(optimizer)


def test_the_state_of_others_is_refused():
    p = torch.nn.Parameter(torch.ones(6, 4))
    p.grad = torch.ones(6, 4)
    adamw = torch.optim.AdamW([p])
    adamw.step()
    with pytest.raises(ValueError, match="of another method, or of another max_precond_dim"):
        SOAP([p]).load_state_dict(adamw.state_dict())
