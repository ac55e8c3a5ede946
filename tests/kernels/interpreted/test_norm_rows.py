"""kernels/norm_rows.py in the interpreter: beside sums in float64, each launch under the guard, and in its methods."""

from itertools import chain

import pytest
import torch

from tests.tools.triton_guard import guard
from thriftlab.kernels import norm_rows
from thriftlab.optim import Apollo, Fira, GaLore

WIDE = [(18, 68), (70, 4), (1, 64)]  # rows that begin at multiples of 16 bytes
ANY = [(5, 67), (33, 17), (1, 1)]
SHAPES = [*WIDE, *ANY]


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Every launch under the guard; the names of the kernels."""
    plain, names = norm_rows.launch, []

    def guarded(kernel, matrices, channels, *given, **options):
        with guard(*chain(*matrices, *channels)) as seen:
            plain(kernel, matrices, channels, *given, **options)
        names.extend(seen)

    monkeypatch.setattr(norm_rows, "launch", guarded)
    return names


def drawn(shapes, seed=0, offset=0):
    """Random matrices, each so many entries behind the start of its storage."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(m * n + offset, generator=draw)[offset:].view(m, n) for m, n in shapes]


def mixed(shapes):
    return [i % 2 == 0 for i in range(len(shapes))]


def square_sums(matrices, rows):
    """In float64, of each channel."""
    return [matrix.double().square().sum(int(r), keepdim=True) for matrix, r in zip(matrices, rows, strict=True)]


def near(found, expected, bound=1e-6):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=bound, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [[True] * len(SHAPES), [False] * len(SHAPES), mixed(SHAPES)], ids=["r", "c", "both"])
@pytest.mark.parametrize("offset", [0, 1])
def test_norms(rows, offset, launches):
    matrices = drawn(SHAPES, offset=offset)
    found = norm_rows.norms(matrices, rows)
    assert launches == ["norms_kernel"] * (1 if offset == 1 else 2), "one for all that are aligned, one for the others"
    near(found, [total.sqrt() for total in square_sums(matrices, rows)])
    assert all(map(torch.equal, found, norm_rows.norms(matrices, rows)))


def test_nothing_to_sum(launches):
    by_row, by_column, none = norm_rows.norms(drawn([(8, 0), (0, 8), (0, 8)]), [True, False, True])
    assert torch.equal(by_row, torch.zeros(8, 1)) and torch.equal(by_column, torch.zeros(1, 8)) and none.numel() == 0
    norm_rows.scale_add(*(drawn([(8, 0)]) for _ in range(2)), [by_row], [True])
    assert "scale_add_kernel" not in launches


def test_what_is_not_finite_stays_in_its_channel():
    matrices, rows = drawn([(20, 70), (20, 70)]), [True, False]
    for matrix in matrices:
        matrix[3, 5], matrix[7, 9] = torch.nan, torch.inf
    by_row, by_column = norm_rows.norms(matrices, rows)
    assert by_row.isnan().nonzero().tolist() == [[3, 0]] and by_row.isinf().nonzero().tolist() == [[7, 0]]
    assert by_column.isnan().nonzero().tolist() == [[0, 5]] and by_column.isinf().nonzero().tolist() == [[0, 9]]


def adam_reference(r, m, v, correction, betas, eps):
    """Kingma and Ba, with eps before the correction, in float64."""
    m = betas[0] * m.double() + (1 - betas[0]) * r.double()
    v = betas[1] * v.double() + (1 - betas[1]) * r.double().square()
    return m, v, correction * m / (v.sqrt() + eps)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("directions", "sizes"), [(True, True), (True, False), (False, True)])
def test_adam_small(directions, sizes, offset, launches):
    smalls, firsts, seconds = (drawn(SHAPES, seed, offset) for seed in range(3))
    for v in seconds:
        v.square_()
    rows, betas, eps = mixed(SHAPES), (0.9, 0.99), 1e-3
    corrections = torch.linspace(0.3, 2, len(SHAPES))
    expected = [
        adam_reference(r, m, v, c, betas, eps)
        for r, m, v, c in zip(smalls, firsts, seconds, corrections.double(), strict=True)
    ]
    before = [small.clone() for small in smalls]
    normalized, norms_n, norms_r = norm_rows.adam_small(
        smalls, firsts, seconds, corrections, betas, eps, rows, directions, sizes
    )
    assert launches == ["adam_kernel"] * (2 - offset)
    assert all(map(torch.equal, smalls, before))
    for found, place in ((firsts, 0), (seconds, 1), (normalized, 2)):
        for one, row in zip(found, expected, strict=directions or place < 2):
            torch.testing.assert_close(one.double(), row[place], rtol=2e-6, atol=1e-7)
    assert len(normalized) == directions * len(SHAPES) and len(norms_n) == len(norms_r) == sizes * len(SHAPES)
    if sizes:
        near(norms_n, [total.sqrt() for total in square_sums([row[2] for row in expected], rows)], 3e-6)
        near(norms_r, [total.sqrt() for total in square_sums(smalls, rows)])


def test_no_eps():
    """What lies beyond the end of a channel has a second moment of zero, and counts for nothing."""
    smalls, firsts, seconds = drawn([(3, 5)]), [torch.zeros(3, 5)], [torch.zeros(3, 5)]
    found = norm_rows.adam_small(smalls, firsts, seconds, torch.tensor([0.1**0.5 / 0.1]), (0.9, 0.9), 0.0, [True])
    near(found[1], [torch.full((3, 1), 5**0.5)], 1e-5)  # entries of sign(R)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("keep", [1.0, 0.75])
def test_scale_add(keep, offset, launches):
    weights, grads, rows = drawn(SHAPES, 0, offset), drawn(SHAPES, 1, offset), mixed(SHAPES)
    factors = [f.sub_(1.0) for f in norm_rows.norms(grads, rows)]
    launches.clear()
    expected = [keep * w.double() + f.double() * g for w, g, f in zip(weights, grads, factors, strict=True)]
    norm_rows.scale_add(weights, grads, factors, rows, keep)
    assert launches == ["scale_add_kernel"] * (2 - offset)
    for one, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


METHODS = {
    "fira": lambda given: Fira(given, lr=1e-2, rank=4, gap=3),
    "fira, exact": lambda given: Fira(given, lr=1e-2, rank=4, gap=3, residual="exact", weight_decay=0.1),
    "fira, gauss": lambda given: Fira(given, lr=1e-2, rank=4, gap=3, subspace="gauss"),
    "apollo": lambda given: Apollo(given, lr=1e-2, rank=4, gap=3, weight_decay=0.1),
    "apollo, one rate": lambda given: Apollo(given, lr=1e-2, rank=1, gap=3, granularity="tensor", scale=16.0),
    "galore": lambda given: GaLore(given, lr=1e-2, rank=4, gap=3, weight_decay=0.1),
}
KERNELS = {"galore": {"adam_kernel"}, "apollo, one rate": {"adam_kernel"}}
ALL = {"norms_kernel", "adam_kernel", "scale_add_kernel"}


def train(make, kernels, monkeypatch):
    """Weights after five steps of a tall and a wide matrix, and by what the limiter divided each, step by step."""
    monkeypatch.setenv("THRIFTLAB_KERNELS", kernels)
    weights = [torch.nn.Parameter(w * 0.02) for w in drawn([(20, 12), (10, 40)])]
    method = make([(f"w{i}", w) for i, w in enumerate(weights)])
    limits = []
    for step, size in enumerate([1.0, 1.5, 0.1, 4.0, 2.0]):
        for weight, grad in zip(weights, drawn([w.shape for w in weights], seed=step + 1), strict=True):
            weight.grad = grad * size
        method.step()
        limits += [state.get("diagnostic.limiter", torch.tensor(1.0)).clone() for state in method.state.values()]
    return [weight.detach() for weight in weights], torch.stack(limits)


@pytest.mark.parametrize("name", METHODS)
def test_five_steps_are_those_of_plain_torch(name, launches, monkeypatch):
    expected, limits = train(METHODS[name], "torch", monkeypatch)
    assert launches == []
    found, found_limits = train(METHODS[name], "triton", monkeypatch)
    assert set(launches) == KERNELS.get(name, ALL)
    assert name == "galore" or limits.max() > 1.05, "the limiter is at work"
    torch.testing.assert_close(found_limits, limits, rtol=1e-5, atol=0)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
