"""GaLore, Fira, APOLLO and dense subspaces against the papers in float64: numpy's SVD, dense algebra, no tricks."""

import math

import numpy as np
import pytest
import torch

from thriftlab.optim import Apollo, Fira, Frugal, GaLore
from thriftlab.optim.core.split import due_refresh
from thriftlab.optim.state.dense import DENSE, leading_vectors

STEPS, GAP, RANK = 27, 8, 2  # refreshes before steps 0, 8, 16 and 24
SHAPES = {"tall": (7, 5), "wide": (4, 6), "square": (5, 5), "thin": (6, 3), "bias": (4,)}
HYPER = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
EXACT = 1e-9  # of float64; a Gram matrix squares the condition number, here below 1e3


def problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {name: torch.nn.Parameter(torch.tensor(rng.normal(size=shape))) for name, shape in SHAPES.items()}
    grads = [{name: rng.normal(size=shape) * 10 ** rng.uniform(-1, 1) for name, shape in SHAPES.items()}
             for _ in range(STEPS)]  # fmt: skip
    return params, grads


class Reference:
    """One matrix, tall: a wide one is transposed, for all rules are the same from the other side."""

    def __init__(self, weight, method, subspace, on_refresh, **hyper):
        w = weight.detach().numpy().copy()
        self.turned = w.ndim == 2 and w.shape[0] < w.shape[1]
        self.w = w.T if self.turned else w
        self.method, self.subspace, self.on_refresh, self.h = method, subspace, on_refresh, {**HYPER, **hyper}
        self.p = self.q = None
        self.k = 0

    def adam(self, r):
        """(N without bias correction, its correction), eps as Hugging Face's"""
        (b1, b2), self.k = self.h["betas"], self.k + 1
        self.m, self.v = b1 * self.m + (1 - b1) * r, b2 * self.v + (1 - b2) * r * r
        if self.method == "frugal":
            n = self.m / (1 - b1**self.k) / (np.sqrt(self.v / (1 - b2**self.k)) + self.h["eps"])
            return n, 1.0
        return self.m / (np.sqrt(self.v) + self.h["eps"]), math.sqrt(1 - b2**self.k) / (1 - b1**self.k)

    def refresh(self, g, drawn):
        rank = min(RANK, g.shape[1])
        p = np.linalg.svd(g)[2][:rank].T if self.subspace == "svd" else drawn  # [n, r]
        if self.p is None or self.on_refresh == "reset":
            self.m = self.v = np.zeros((len(g), p.shape[1]))
            self.k = 0
        elif self.on_refresh == "project":
            change = p.T @ self.p
            self.m, self.v = self.m @ change.T, self.v @ (change.T**2)
        elif self.subspace == "svd":
            p = p * np.where(np.diag(p.T @ self.p) < 0, -1, 1)
        self.p = p

    def limited(self, s):
        norm = np.linalg.norm(s)
        if self.q is None:
            self.q = norm
            return s
        factor = max(norm / (self.q + 1e-8), self.h.get("gamma", 1.01)) / self.h.get("gamma", 1.01)
        self.q = norm / factor
        return s / factor

    def step(self, g, t, drawn):
        lr = self.h["lr"]
        if g.ndim == 1:
            if t == 0:
                self.m = self.v = np.zeros_like(g)
            n, c = self.adam(g)
            self.w = (1 - lr * self.h["weight_decay"]) * (self.w - lr * c * n)
            return
        g = g.T if self.turned else g
        if t % GAP == 0:
            self.refresh(g, drawn)
        if self.method == "frugal":
            self.w = (1 - lr * self.h["weight_decay"]) * self.w
        r = g @ self.p
        n, c = self.adam(r)
        self.w = self.w - lr * self.update(g, r, n, c)
        if self.method != "frugal":
            self.w = (1 - lr * self.h["weight_decay"]) * self.w

    def update(self, g, r, n, c):
        up, h = self.p.T, self.h
        norm = np.linalg.norm
        if self.method == "frugal":
            return h["split_lr_scale"] * (n @ up + h["free_lr_scale"] * np.sign(g - r @ up))
        if self.method == "galore":
            return h["scale"] * c * n @ up
        if self.method == "fira" and h["residual"] == "exact":
            phi = norm(c * n, axis=1) / (norm(r, axis=1) + 1e-8)
            return h["alpha"] * (c * n @ up + self.limited(phi[:, None] * (g - r @ up)))
        phi = norm(n, axis=1, keepdims=True) / (norm(r, axis=1, keepdims=True) + 1e-8)
        if self.method == "fira":
            return c * (h["alpha"] * n @ up + self.limited(phi * (g - h["alpha"] * r @ up)))
        if h["granularity"] == "tensor":
            phi = norm(n) / (norm(r) + 1e-8)
        return c * math.sqrt(h["scale"]) * self.limited(phi * g)


METHODS = {
    "galore": (GaLore, dict(rank=RANK, scale=0.3)),
    "fira": (Fira, dict(rank=RANK, alpha=0.3, gamma=1.05, residual="reference")),
    "fira exact": (Fira, dict(rank=RANK, alpha=0.3, gamma=1.05, residual="exact")),
    "apollo": (Apollo, dict(rank=RANK, scale=2.0, gamma=1.05, granularity="channel")),
    "mini": (Apollo, dict(rank=RANK, scale=2.0, gamma=1.05, granularity="tensor")),
    "frugal": (Frugal, dict(density=0.4, split_lr_scale=0.5, free_lr_scale=0.3)),
}


def drawn(optimizer, p):
    """The basis in the state, as [n, r]."""
    return optimizer.state[p]["basis.vectors"].numpy() if p.ndim == 2 else None


@pytest.mark.parametrize("on_refresh", ["reset", "keep", "project"])
@pytest.mark.parametrize("subspace", ["svd", "gauss", "orthogonal"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_their_papers(method, subspace, on_refresh):
    cls, hyper = METHODS[method]
    params, grads = problem()
    if method == "frugal":  # whose plain tensors follow torch's convention, and whose rank follows from the density
        params = {name: p for name, p in params.items() if p.ndim == 2 and round(0.4 * min(p.shape)) == RANK}
    optimizer = cls(params.items(), gap=GAP, subspace=subspace, on_refresh=on_refresh, **hyper, **HYPER)
    references = {name: Reference(p, method.split()[0], subspace, on_refresh, **hyper) for name, p in params.items()}
    for t, step in enumerate(grads):
        for name, p in params.items():
            p.grad = torch.tensor(step[name])
        optimizer.step()
        for name, reference in references.items():
            reference.step(step[name], t, drawn(optimizer, params[name]))
            want = reference.w.T if reference.turned else reference.w
            assert np.allclose(params[name].detach().numpy(), want, rtol=EXACT, atol=EXACT), (name, t)


def run(make, steps=STEPS, change=lambda grads: grads):
    params, grads = problem()
    optimizer = make(params.items())
    for step in change(grads)[:steps]:
        for name, p in params.items():
            p.grad = torch.tensor(step[name])
        optimizer.step()
    return {name: p.detach().clone() for name, p in params.items()}, optimizer


def test_fira_with_alpha_0_is_apollo_in_singular_vectors():
    fira, _ = run(lambda p: Fira(p, alpha=0.0, rank=RANK, gap=GAP, **HYPER))
    apollo, _ = run(lambda p: Apollo(p, subspace="svd", rank=RANK, gap=GAP, **HYPER))
    assert all(torch.allclose(fira[name], apollo[name], rtol=1e-13, atol=1e-13) for name in SHAPES)


class Given:
    """Singular vectors whose signs are turned at random."""

    def __init__(self, flips, arbitrary_signs=True):
        self.flips, self.arbitrary_signs = flips, arbitrary_signs

    def refresh(self, grad, name, count, generator):
        p = leading_vectors(grad, min(RANK, *grad.shape))
        signs = torch.randint(0, 2, (p.shape[1],), generator=generator) * 2.0 - 1
        return {"p": (p * (signs if self.flips else 1)).to(grad.dtype)}

    def down(self, grad, basis):
        return grad @ basis["p"] if grad.shape[0] >= grad.shape[1] else basis["p"].T @ grad

    def up(self, small, basis):
        p = basis["p"]
        return small @ p.T if small.shape[1] == p.shape[1] else p @ small


@pytest.mark.parametrize("on_refresh", ["reset", "keep", "project"])
@pytest.mark.parametrize("cls", [GaLore, Fira, Apollo, Frugal])
def test_the_signs_of_a_basis_change_nothing(cls, on_refresh):
    def make(flips):
        return run(lambda p: cls(p, subspace=Given(flips), gap=GAP, on_refresh=on_refresh, **HYPER))[0]

    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(make(0).values(), make(1).values(), strict=True)
    )


def test_a_given_basis_is_taken_as_it_is():
    def make(flips):
        return run(lambda p: GaLore(p, subspace=Given(flips, arbitrary_signs=False), gap=GAP, **HYPER))[0]

    assert not torch.allclose(make(0)["tall"], make(1)["tall"])


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
def test_leading_vectors_are_those_of_the_svd(shape):
    """In float32, beside small gaps and singular values over four decades."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 30)))[0] for n in shape)
    s = 0.7 ** np.arange(30)
    s[10:] *= s[9] / s[10] / 1.05
    grad = torch.tensor(u * s @ v.T, dtype=torch.float32)
    want = v if shape[0] >= shape[1] else u
    got = leading_vectors(grad, 10).double().numpy()
    cosines = np.linalg.svd(got.T @ want[:, :10])[1]
    assert np.sqrt(1 - np.minimum(cosines, 1) ** 2).max() < 1e-3
    assert got.shape == (30, 10) and np.allclose(got.T @ got, np.eye(10), atol=1e-5)


def test_random_bases():
    grad = torch.zeros(60, 40)
    draw = lambda name, seed: DENSE[name](rank=20).refresh(  # noqa: E731
        grad, "w", 0, torch.Generator().manual_seed(seed))["vectors"]  # fmt: skip
    q = draw("orthogonal", 0)
    assert torch.allclose(q.T @ q, torch.eye(20), atol=1e-5)
    g = torch.stack([draw("gauss", seed) for seed in range(50)])
    assert abs(g.var().item() * 20 - 1) < 5 * math.sqrt(2 / g.numel()) and abs(g.mean().item()) < 5 / math.sqrt(
        20e0 * g.numel()
    )
    assert DENSE["svd"](density=0.25).size((10, 30)) == 2 and DENSE["svd"](density=0.25).size((14, 30)) == 4
    assert DENSE["svd"](rank=50).size((10, 30)) == 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("make", [
    lambda p, **k: GaLore(p, rank=RANK, gap=GAP, **k), lambda p, **k: Frugal(p, gap=GAP, density=0.5, **k),
])  # fmt: skip
def test_a_gradient_that_is_not_finite_crashes_no_refresh(make, value):
    """Singular vectors stay, and without any the matrix is left alone; random ones are drawn and counted."""

    def broken(grads, at):
        return [{n: g * (value if t == at else 1) for n, g in step.items()} for t, step in enumerate(grads)]

    started, _ = run(lambda p: make(p, subspace="svd"), 1, lambda grads: broken(grads, 0))
    assert all(torch.equal(started[name], p) for name, p in problem()[0].items() if p.ndim == 2)
    late, _ = run(lambda p: make(p, subspace="svd"), STEPS - 1, lambda grads: broken(grads, 0))
    assert not torch.equal(late["tall"], problem()[0]["tall"]) and late["tall"].isfinite().all()
    _, before = run(lambda p: make(p, subspace="svd"), GAP)
    _, after = run(lambda p: make(p, subspace="svd"), GAP + 1, lambda grads: broken(grads, GAP))
    pairs = zip(before.state.values(), after.state.values(), strict=True)
    assert all(torch.equal(a["basis.vectors"], b["basis.vectors"]) for a, b in pairs if "basis.vectors" in a)
    _, wanted = run(lambda p: make(p, subspace="gauss"), GAP + 1)
    _, drawn = run(lambda p: make(p, subspace="gauss"), GAP + 1, lambda grads: broken(grads, GAP))
    pairs = zip(wanted.state.values(), drawn.state.values(), strict=True)
    assert all(torch.equal(a["basis.vectors"], b["basis.vectors"]) for a, b in pairs if "basis.vectors" in a)


@pytest.mark.parametrize("zero_at", [0, 12])
@pytest.mark.parametrize("cls", [Fira, Apollo])
def test_the_limiter_forgets_a_zero_gradient(cls, zero_at):
    def zeroed(grads):
        return [{n: g * (t != zero_at) for n, g in step.items()} for t, step in enumerate(grads)]

    def last_step(change):
        make = lambda p: cls(p, rank=RANK, gap=100, lr=0.02)  # noqa: E731
        before, after = run(make, zero_at + 10, change)[0], run(make, zero_at + 11, change)[0]
        return (after["tall"] - before["tall"]).norm()

    assert last_step(zeroed) > 0.3 * last_step(lambda grads: grads)


def test_staggered_refreshes_come_once_in_a_gap_each_at_its_own_time():
    group = {"gap": 10, "seed": 0, "stagger": True}
    times = {name: [t for t in range(41) if due_refresh(name, t, group) is not None] for name in "abcdefgh"}
    for name, due in times.items():
        assert due[0] == 0 and 1 <= due[1] <= 10 and {b - a for a, b in zip(due[1:], due[2:], strict=False)} == {10}
        assert [due_refresh(name, t, group) for t in due] == list(range(len(due)))
    assert len({due[1] for due in times.values()}) > 3
    other = {**group, "seed": 1}
    assert any(due_refresh(name, due[1], other) is None for name, due in times.items()), "the seed counts"
    group["stagger"] = False
    assert [t for t in range(41) if due_refresh("a", t, group) is not None] == [0, 10, 20, 30, 40]


def test_specs_are_the_papers_formulas():
    m, n, r, b = 40, 24, 6, 4

    def size(optimizer):
        return sum(torch.Size(s).numel() * d.itemsize for s, d in optimizer.spec((m, n), torch.float32).values() if s)

    p = [torch.nn.Parameter(torch.zeros(2))]
    for cls in (GaLore, Fira, Apollo):
        assert size(cls(p, rank=r)) == 2 * r * m * b + r * n * b
    assert size(Apollo(p, rank=1, granularity="tensor", scale=128.0)) == (2 * m + n) * b
    assert size(Frugal(p, subspace="svd", density=0.25)) == 2 * r * m * b + r * n * b


def test_a_warm_basis_converges_to_the_singular_vectors():
    rng = np.random.default_rng(0)
    for shape in ((40, 30), (30, 40)):
        u, v = (np.linalg.qr(rng.normal(size=(n, 30)))[0] for n in shape)
        grad = torch.tensor(u * 0.7 ** np.arange(30) @ v.T, dtype=torch.float32)
        subspace = DENSE["warm_svd"](rank=10)
        basis = {"vectors": DENSE["orthogonal"](rank=10).draw(grad, 10, torch.Generator().manual_seed(0)).float()}
        energy = []
        for _ in range(6):
            basis = subspace.refine(grad, basis)
            energy.append(subspace.down(grad, basis).square().sum() / (0.7 ** torch.arange(10.0)).square().sum())
        assert energy[0] > 0.999 and abs(energy[-1] - 1) < 1e-5
        want = leading_vectors(grad, 10).float()
        assert torch.allclose((basis["vectors"] * want).sum(0).abs(), torch.ones(10), atol=1e-4)


def test_diagnostics():
    """A basis of 2 of 4 coordinates that moves on by one: energy and overlap are plain to see."""

    class Window(DENSE["orthogonal"]):
        def draw(self, grad, rank, generator):
            self.at = getattr(self, "at", -1) + 1
            return torch.eye(4)[:, self.at : self.at + 2]

    p = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = Fira([("w", p)], subspace=Window(rank=2), gap=2)
    p.grad = torch.tensor([3.0, 1.0, 1.0, 1.0]).expand(6, 4).contiguous()
    optimizer.step()
    first = {key: value.item() for key, value in optimizer.diagnostics()["w"].items()}
    assert first == pytest.approx({"residual": 2 / 12, "overlap": 0, "limiter": 1})
    for _ in range(2):
        optimizer.step()
    third = {key: value.item() for key, value in optimizer.diagnostics()["w"].items()}
    assert third["residual"] == pytest.approx(10 / 12) and third["overlap"] == pytest.approx(0.5)
    assert third["limiter"] >= 1
