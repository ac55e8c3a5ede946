"""Moments in fp32, bf16 and 8 bits: what each keeps of the numbers, held against float64."""

import math

import pytest
import torch
from torch.nn.functional import pad

from tests.tools.methods import GAP, SHAPES, gradient, parameters, same, through_a_file, train
from thriftlab.optim import (
    RMNP,
    AdamW,
    Apollo,
    BAdam,
    Fira,
    Frugal,
    GaLore,
    Muon,
    NorMuon,
    predicted_state_bytes,
    state_bytes,
)
from thriftlab.optim.state import storage
from thriftlab.optim.state.dense import DENSE
from thriftlab.optim.state.rules import PIECE

KEPT = ["fp32", "bf16", "8bit"]
BIG = 2 * PIECE + 300  # three pieces, and a last 8-bit block that is not full
MAKERS = {
    "adamw": AdamW,
    "blocks": lambda p, **k: Frugal(p, gap=GAP, density=0.5, **k),
    "columns": lambda p, **k: Frugal(p, gap=GAP, density=0.5, subspace="columns", on_refresh="project", **k),
    "lion": lambda p, **k: Frugal(p, gap=GAP, density=0.5, subspace="rows", rule="lion", **k),
}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@both
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_state_has_the_declared_bytes_and_resumes_to_the_bit(make, kept, dtype):
    params = parameters(dtype)
    optimizer = make(params.items(), state_dtype=kept)
    declared = predicted_state_bytes(optimizer)
    for t in range(GAP + 2):
        train(params, optimizer, [t])
        assert t or state_bytes(optimizer) == declared
        for name, p in params.items():
            spec = optimizer.expected_spec(name, p, optimizer.param_groups[0])
            assert spec == {key: (tuple(value.shape), value.dtype) for key, value in optimizer.state[p].items()}
    saved = through_a_file(optimizer.state_dict())
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    fresh = make(copies.items(), state_dtype=kept)
    fresh.load_state_dict(saved)
    assert same(train(params, optimizer, range(6, 12)), train(copies, fresh, range(6, 12)))


def test_bytes_of_each_kind():
    p = [torch.nn.Parameter(torch.zeros(30, 30))]
    blocks = math.ceil(900 / 256)
    for kept, per_moment in (("fp32", 4 * 900), ("bf16", 2 * 900), ("8bit", 900 + 4 * blocks)):
        for dtype in (torch.float32, torch.bfloat16):
            spec = AdamW(p, state_dtype=kept).spec((30, 30), dtype)
            size = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in spec.values() if shape)
            assert size == 2 * per_moment, (kept, dtype)


@pytest.mark.parametrize("kept", KEPT)
def test_a_tensor_steps_in_pieces_as_it_does_whole(monkeypatch, kept):
    """And transposed weights as contiguous ones do: rounding follows the entry, not where it lies."""
    start = torch.randn(BIG // 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights = []
    for piece, transposed in ((PIECE, False), (2**30, False), (storage.BLOCK * 64, True)):
        monkeypatch.setattr("thriftlab.optim.state.rules.PIECE", piece)
        p = torch.nn.Parameter(start.t().contiguous().t() if transposed else start.clone())
        optimizer = AdamW([("w", p)], state_dtype=kept, lr=0.01)
        for t in range(3):
            p.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(t)).bfloat16()
            optimizer.step()
        weights.append(p.detach())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kept", KEPT)
def test_a_transposed_weight_resumes_to_the_bit(kept):
    weights, saved = [], None
    for stop in (6, 3):
        p = torch.nn.Parameter(torch.ones(40, 24, dtype=torch.bfloat16).t())
        optimizer = AdamW([p], state_dtype=kept)
        for t in range(6):
            if t == stop:
                optimizer = AdamW([p], state_dtype=kept)
                optimizer.load_state_dict(saved)
            p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(t)).bfloat16()
            optimizer.step()
            saved = through_a_file(optimizer.state_dict())
        weights.append(p.detach())
    assert torch.equal(*weights)


def test_random_rounding_is_right_in_the_mean_and_goes_to_a_neighbour():
    draws = 4096
    for x in (1 + 1 / 512, 1 + 1 / 4096, 3.14159e-9, 0.1, 5e-37):
        value = torch.full((draws,), x, dtype=torch.float32)
        bits = storage.random_bits(torch.tensor(7), torch.tensor(3.0), 0, draws, value.device)
        got = storage.round_randomly(value, bits).double()
        exact = value[0].double().item()
        below = torch.tensor(exact).float().view(torch.int32).bitwise_and(-0x10000).view(torch.float32).item()
        above = (torch.tensor(below).view(torch.int32) + 0x10000).view(torch.float32).item()
        assert set(got.tolist()) <= {below, above}
        up = (exact - below) / (above - below)
        bound = 5 * math.sqrt(up * (1 - up) / draws) * (above - below)  # 5 standard deviations of the mean
        assert abs(got.mean().item() - exact) <= bound + 2**-16 * (above - below)  # and the grain of 16 bits
    exact = torch.tensor([0.0, 1.0, -2.0, math.inf])
    assert torch.equal(storage.round_randomly(exact, torch.full((4,), 0xFFFF, dtype=torch.int32)), exact.bfloat16())
    for pattern in (0x7FC00000, 0x7FFFFFFF, -0x400000):  # what arithmetic makes: ARM, CUDA, x86
        nan = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
        for bits in (0, 1, 0xFFFF):
            assert storage.round_randomly(nan, torch.tensor([bits], dtype=torch.int32)).isnan()


def test_random_bits_are_a_function_of_seed_name_step_and_entry():
    def weight(seed=0, name="w", others=0):
        pairs = [(f"o{i}", torch.nn.Parameter(torch.ones(5))) for i in range(others)]
        p = torch.nn.Parameter(torch.ones(64, 64))
        pairs.append((name, p))
        optimizer = AdamW(pairs, state_dtype="bf16", seed=seed)
        for t in range(3):
            for _, q in pairs:
                q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        return optimizer.state[p]["exp_avg_sq"]

    torch.manual_seed(0)
    first = weight()
    torch.manual_seed(1)
    assert torch.equal(first, weight(others=3)), "what else is stepped does not matter, nor the global generator"
    assert not torch.equal(first, weight(seed=1)) and not torch.equal(first, weight(name="v"))
    bits = torch.stack([storage.random_bits(torch.tensor(5), torch.tensor(t), 0, 10_000, "cpu") for t in range(4)])
    assert torch.equal(bits[0][100:], storage.random_bits(torch.tensor(5), torch.tensor(0), 100, 10_000, "cpu"))
    means = bits.double().mean(1) / 2**16
    assert (means - 0.5).abs().max() < 5 / math.sqrt(12 * 10_000), "uniform"
    agree = (bits[0] == bits[1]).sum()
    assert agree < 10, "independent from step to step"  # 0.15 expected


def test_a_second_moment_in_bf16_decays_as_in_float64():
    """Gradients of one size, then none for 1000 steps: rounded to nearest it would never fall below 0.5."""
    p = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW([p], state_dtype="bf16", betas=(0.9, 0.999), lr=0.0)
    v, steps, noise = 0.0, 0, 0.0
    for size, many in ((1.0, 500), (0.0, 1000)):
        for _ in range(many):
            p.grad = torch.full_like(p, size)
            optimizer.step()
            v = 0.999 * v + 0.001 * size**2
            noise = 0.999**2 * noise + (v * 2**-7) ** 2 / 4  # a spacing is <= 2^-7 v; Bernoulli variance <= 1/4
            steps += 1
    got = optimizer.state[p]["exp_avg_sq"].double()
    assert abs(got.mean().item() - v) < 5 * math.sqrt(noise / p.numel()) + steps * 2**-16 * 2**-7
    assert (got - v).abs().max() < 6 * math.sqrt(noise), "and every entry is near"


def paper_levels(positive):
    """2110.02861, section 2.2 and figure 2: an exponent of base 10 in unary, then a linear fraction."""
    values = {1.0} | ({1e-7} if positive else {0.0})
    for exponent in range(7):
        bits = 7 + positive - 1 - exponent
        edges = [0.1 + 0.9 * k / 2**bits for k in range(2**bits + 1)]
        middles = [(a + b) / 2 * 10.0**-exponent for a, b in zip(edges, edges[1:], strict=False)]
        values |= set(middles) if positive else {sign * m for m in middles for sign in (1, -1)}
    return torch.tensor(sorted(values), dtype=torch.float64)


@pytest.mark.parametrize("positive", [True, False])
def test_8_bit_codes_are_the_nearest_levels_of_the_paper(positive):
    name = "exp_avg_sq" if positive else "exp_avg"
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(1000, generator=draw) * 10 ** (-4 * torch.rand(1000, generator=draw))
    x = x.square() if positive else x
    x[256:512] = 0
    state = {name: torch.zeros(1000, dtype=torch.uint8), f"{name}.scale": torch.zeros(4)}
    assert storage.load(state, name).eq(0).all(), "zeros are zeros"
    storage.store(state, name, x.clone())
    got, levels = storage.load(state, name).double(), paper_levels(positive)
    assert len(levels) == 256 and torch.allclose(levels, storage.codebook(positive, "cpu").double(), rtol=1e-6, atol=0)
    for start in (0, 256, 512, 768):
        part, back = x[start : start + 256].double(), got[start : start + 256]
        scale = part.abs().max()
        distances = ((part / scale if scale else part)[:, None] - levels).abs()
        best = distances.min(1).values * scale
        assert ((part - back).abs() <= best + (part.abs() + back.abs()) * 2**-22).all()  # some roundings of fp32
    assert torch.equal(got[256:512], torch.zeros(256, dtype=torch.float64))
    if positive:
        assert (got[x > 0] > 0).all(), "no denominator of zero"
        relative = (got / x.double() - 1)[(x > x.max() * 1e-3) & (x > 0)].abs()
        assert relative.max() < 0.9 / 2**5 / 2 / 0.1 + 1e-6, "32 levels in the third decade"


@pytest.mark.slow
@pytest.mark.parametrize("positive", [True, False])
def test_codes_by_look_up_are_those_of_a_search(positive):
    """For numbers of every size, and for the borders between levels with both of their neighbours."""
    levels = storage.codebook(positive, "cpu")
    borders = (levels[1:] + levels[:-1]) / 2
    draw = torch.Generator().manual_seed(0)
    spread = torch.rand(100_000, generator=draw) * 10 ** (-9 * torch.rand(100_000, generator=draw))
    x = torch.cat(
        [borders, *(borders.nextafter(torch.tensor(to)) for to in (-2.0, 2.0)), levels, spread, torch.zeros(1)]
    )
    x = x if positive else torch.cat([x, -spread, -torch.zeros(1), torch.tensor([-1.0])])
    x = pad(x.view(-1, 1), (0, 255), value=1.0)  # a block each, whose largest entry is 1
    codes, scale = storage.quantise(x.view(-1), positive)
    assert scale.eq(1).all()
    assert torch.equal(codes.view(-1, 256)[:, 0].long(), torch.bucketize(x[:, 0].contiguous(), borders))


def test_random_bits_are_independent():
    """Of neighbours, of the same entry in other steps and of other keys: means, bits and products, 5 deviations."""
    n = 2**16
    bits = torch.stack(
        [storage.random_bits(torch.tensor(k), torch.tensor(t), 0, n, "cpu") for k in (1, 1000, 2**61) for t in range(6)]
    )
    assert bits.min() >= 0 and bits.max() <= 0xFFFF
    x = bits.double() / 2**16 - 0.5 + 2**-17  # variance 1/12
    assert (x.mean(1).abs() < 5 / math.sqrt(12 * n)).all()
    assert ((x.square().mean(1) - 1 / 12).abs() < 5 * math.sqrt(1 / 180 / n)).all()
    each = torch.stack([(bits >> i & 1).double().mean(1) - 0.5 for i in range(16)])
    assert (each.abs() < 5 * 0.5 / math.sqrt(n)).all(), "every bit"
    bound = 5 / 12 / math.sqrt(n)
    for lag in (1, 2, 3, 4, 16, 256, 1024, 4096):
        assert ((x[:, lag:] * x[:, :-lag]).mean(1).abs() < bound * 1.1).all(), lag
    products = x @ x.T / n - torch.eye(len(x)) / 12
    assert (products.abs() < bound).logical_or(torch.eye(len(x)) > 0).all(), "steps and keys"
    counts = torch.stack([torch.bincount(row >> 8, minlength=256) for row in bits]).double()
    chi = ((counts - n / 256) ** 2 / (n / 256)).sum(1)
    assert ((chi - 255).abs() < 5 * math.sqrt(2 * 255)).all(), "flat"
    far = storage.random_bits(torch.tensor(1), torch.tensor(0), 2**31 - 8, 2**31 + 8, "cpu")
    assert torch.equal(far[8:], storage.random_bits(torch.tensor(1), torch.tensor(0), 2**31, 2**31 + 8, "cpu"))


@pytest.mark.parametrize(("kept", "near"), [("bf16", 0.02), ("8bit", 0.2)])
def test_adamw_with_small_state_walks_near_the_exact_path(kept, near):
    """Relative distance of the displacement to that of fp32 state, on noisy quadratics."""

    def walk(kept):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 1024).view(32, 32).clone())
        optimizer, draw = AdamW([p], state_dtype=kept, lr=0.003), torch.Generator().manual_seed(4)
        for _ in range(200):
            p.grad = p.detach() + 0.3 * torch.randn(p.shape, generator=draw)
            optimizer.step()
        return p.detach() - torch.linspace(-1, 1, 1024).view(32, 32)

    exact = walk("fp32")
    assert 0 < (walk(kept) - exact).norm() / exact.norm() < near


def test_the_state_dtype_is_checked():
    with pytest.raises(ValueError, match="state_dtype='fp8'"):
        AdamW(parameters().values(), state_dtype="fp8")
    assert set(SHAPES) and gradient("a", 0).shape == (6, 8)


@pytest.mark.parametrize("shape", [(512, 768), (768, 512), (512, 512)])
@pytest.mark.parametrize("kept", KEPT)
def test_no_state_is_larger_than_the_published_codes(shape, kept):
    """Bytes of one fp32 matrix by the formulas of the published codes, b bytes for each entry of a moment."""
    (m, n), b = shape, {"fp32": 4, "bf16": 2, "8bit": 1 + 4 / 256}[kept]
    r, long, short, p = 128, max(shape), min(shape), [torch.nn.Parameter(torch.zeros(2))]
    cases = [
        (AdamW(p, state_dtype=kept), 2 * m * n * b, 0),
        (Muon(p, state_dtype=kept), m * n * b, 0),
        (RMNP(p, state_dtype=kept), m * n * b, 0),
        (NorMuon(p, state_dtype=kept), m * n * b, 4 * m),
        (BAdam(p, state_dtype=kept), 2 * m * n * b, 0),
        (Apollo(p, rank=1, granularity="tensor", state_dtype=kept), 2 * long * b, 4 * short),
    ]
    for cls, subspaces in ((GaLore, DENSE), (Fira, DENSE), (Apollo, DENSE)):
        cases += [(cls(p, rank=r, subspace=s, state_dtype=kept), 2 * r * long * b, 4 * r * short) for s in subspaces]
    sizes = {"blocks": (2 * m * n, 0), "columns": (2 * m * (n // 4), n), "rows": (2 * n * (m // 4), m)}
    sizes |= {"coordinates": (2 * (m * n // 4), 0)}
    sizes |= {s: (2 * (short // 4) * long, 4 * (short // 4) * short) for s in DENSE}
    cases += [(Frugal(p, subspace=s, state_dtype=kept), moments * b, basis) for s, (moments, basis) in sizes.items()]
    for optimizer, moments, basis in cases:
        spec = optimizer.spec(shape, torch.float32)
        size = sum(torch.Size(s).numel() * d.itemsize for s, d in spec.values() if s)
        assert size == moments + basis, (type(optimizer), optimizer.defaults.get("subspace"))
