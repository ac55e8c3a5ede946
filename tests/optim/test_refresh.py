"""The refresh against numpy's SVD in float64: angles where singular values are apart, energy where they are not."""

import math

import numpy as np
import pytest
import torch

from thriftlab.optim.state import asking
from thriftlab.optim.state.dense import DENSE, leading, leading_vectors, tracked
from thriftlab.train.model import GPT, ModelConfig


def with_spectrum(values, shape, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in shape)
    return torch.tensor(u * values @ v.T, dtype=torch.float32)


def assert_leading(grad, rank, got, resolved):
    """Whether the angle was told, which is so from `resolved` on, the least sigma_rank / sigma_1."""
    matrix = grad.double().numpy()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    _, values, rows = np.linalg.svd(tall, full_matrices=False)
    got = got.double().numpy()
    assert np.allclose(got.T @ got, np.eye(rank), atol=1e-5)
    energy = ((tall @ got) ** 2).sum()
    assert energy >= 0.999 * (values[:rank] ** 2).sum()
    if values[rank - 1] >= 1.05 * values[rank] and values[rank - 1] >= resolved * values[0]:
        assert np.linalg.norm(got - rows[:rank].T @ (rows[:rank] @ got), 2) <= 1e-3
        return True
    return False


def found(grad, rank, start):
    """Cold, and warm from `start`: (name, basis, least resolved ratio)"""
    yield "cold", DENSE["svd"](rank=rank).draw(grad, rank, None), 1e-5
    yield "warm", DENSE["warm_svd"](rank=rank).refine(grad, {"vectors": start})["vectors"], 1e-3


def near(grad, rank, seed):
    """An orthonormal basis that has only something to do with the gradient."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(min(grad.shape), rank)) / math.sqrt(min(grad.shape))
    return torch.tensor(np.linalg.qr(leading_vectors(grad, rank).numpy() + noise)[0], dtype=torch.float32)


N = 120
SPECTRA = {
    "power law": np.arange(1, N + 1) ** -1.0,
    "flat": np.ones(N),
    "noise": np.sqrt(np.linspace(4, 0.01, N)),
    "four decades": 10 ** np.linspace(0, -4, N),
    "seven decades": 10 ** np.linspace(0, -7, N),
    "clusters": np.repeat([9.0, 3.0, 2.0, 0.5, 0.1], N // 5),
    "one large": np.r_[1e3, np.linspace(2, 1, N - 1)],
    "rank deficient": np.r_[np.linspace(2, 1, 9), np.zeros(N - 9)],
}


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(N, N), (N, 150), (150, N)])
def test_a_basis_is_the_svds(spectrum, shape):
    """With the spectrum as it is, and with a gap of 6 % made below the rank; from near and from an unrelated start."""
    for rank in (1, 4, 30):
        for gap in (1.0, 1.06):
            values = SPECTRA[spectrum].copy()
            values[rank:] /= gap
            grad = with_spectrum(values, shape)
            for seed, start in enumerate((near(grad, rank, 1), near(with_spectrum(values, shape, 5), rank, 1))):
                for name, got, resolved in found(grad, rank, start):
                    told = assert_leading(grad, rank, got, resolved)
                    resolvable = values[rank - 1] > 1.001e-3 * values[0]
                    assert told or gap == 1.0 or not resolvable, (name, seed)


def test_what_the_last_basis_does_not_see_is_found():
    """Gradients in two blocks of coordinates, of which the other one leads after the change."""
    blocks = [with_spectrum(np.linspace(2, 1, 30), (60, 60), seed) for seed in (1, 2)]
    first, second = (torch.block_diag(a * blocks[0], b * blocks[1]) for a, b in ((1, 1e-2), (1e-2, 1)))
    start = leading_vectors(first, 20).float()
    assert_leading(second, 20, DENSE["warm_svd"](rank=20).refine(second, {"vectors": start})["vectors"], 1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
def test_the_scale_does_not_matter(scale):
    grad = with_spectrum(SPECTRA["power law"], (150, N))
    for _, got, resolved in found(grad * scale, 20, near(grad, 20, 2)):
        assert_leading(grad * scale, 20, got, resolved)


def test_zero_gradients_and_bf16_ones():
    for dtype in (torch.float32, torch.bfloat16):
        for grad in (torch.zeros(150, N), with_spectrum(SPECTRA["four decades"], (N, 150))):
            grad = grad.to(dtype)
            for _, got, _ in found(grad, 20, near(grad.float(), 20, 3).to(dtype)):
                assert got.isfinite().all() and torch.allclose((got.T @ got).float(), torch.eye(20), atol=0.05)


def test_a_basis_is_a_function_of_the_gradient():
    grad = with_spectrum(SPECTRA["power law"], (150, N))
    torch.manual_seed(0)
    first = leading_vectors(grad, 20)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, leading_vectors(grad.clone(), 20)) and torch.equal(state, torch.get_rng_state())


def test_gradients_of_a_run():
    """A small GPT, a step of AdamW between recordings; the basis before is where the next one starts."""
    model = GPT(ModelConfig(preset=None, dim=96, layers=1, heads=2, hidden=160, vocab_size=64))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    last, told = {}, 0
    for step in range(8):
        batch = torch.randint(64, (1, 8, 17), generator=torch.Generator().manual_seed(step))[0].sort(1).values
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).mean().backward()
        for name, p in model.layers.named_parameters():
            if p.ndim == 2:
                for rank in (2, 8, 24):
                    start = last.get((name, rank), near(p.grad, rank, 4))
                    for kind, got, resolved in found(p.grad, rank, start):
                        told += assert_leading(p.grad, rank, got, resolved)
                        if kind == "cold":
                            last[name, rank] = got.float()
        optimizer.step()
    assert told > 20


def test_searches_in_step_find_what_each_finds_alone():
    """Of one shape and of two, of which some take more rounds, one is decomposed, and one goes on from a basis."""
    easy, hard = SPECTRA["power law"], SPECTRA["noise"]
    grads = with_spectrum(easy, (150, N)), with_spectrum(hard, (N, 150)), with_spectrum(easy, (150, N), 2)[:, :80]
    cases = [*((grad, 4, None) for grad in grads), (grads[0], 60, None), (grads[0], 4, near(grads[0], 4, 1))]
    alone = [leading_vectors(*case) for case in cases]
    asked = []

    def heard(kind, ask):
        return lambda tensors: asked.append((kind, len(tensors))) or ask(tensors)

    with pytest.MonkeyPatch.context() as patch:
        for kind, ask in asking.ANSWERS.items():
            patch.setitem(asking.ANSWERS, kind, heard(kind, ask))
        together = asking.in_step([leading(*case) for case in cases])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert asked[:3] == [("eigen", 3), ("eigen", 1), ("eigen", 1)] and ("read", 4) in asked


def test_a_turn_in_step_is_the_turn_alone():
    draw = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(12, 4, generator=draw))[0] for _ in range(3)]
    grads = [torch.randn(20, 12, generator=draw) for _ in range(3)]
    together = asking.in_step([tracked(basis, grad, 0.1) for basis, grad in zip(bases, grads, strict=True)])
    for basis, grad, found in zip(bases, grads, together, strict=True):
        assert torch.equal(found, asking.in_step([tracked(basis, grad, 0.1)])[0]) and not torch.equal(found, basis)
