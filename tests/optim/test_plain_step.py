"""A plain step, one without a refresh: the memory that it takes for a while, and that it compiles."""

import pytest
import torch

from tests.tools.methods import MAKERS, gradient, parameters
from thriftlab.launch.bench import peak_allocation
from thriftlab.optim import (
    RMNP,
    SOAP,
    AdamMini,
    Apollo,
    Conda,
    Dion2,
    Fira,
    Frugal,
    GaLore,
    Muon,
    NorMuon,
    Scale,
    SignSGD,
    SinkGD,
    SubTrack,
)  # fmt: skip
from thriftlab.optim.core.projected import norms
from thriftlab.optim.state.rules import PIECE, add_sign, row_chunks

SHAPE, RANK = (2048, 512), 32  # 8 PIECEs
WHOLE, SMALL = 4 * 2048 * 512, 4 * 2048 * RANK  # bytes
SIGNS, SPARE = 4 * PIECE, 2**14

# The most that a step holds, by what it is made of.
TRANSIENT = {
    "signsgd": (lambda p: SignSGD(p), SIGNS),
    "blocks": (lambda p: Frugal(p, density=0.0), SIGNS),
    "columns": (lambda p: Frugal(p, subspace="columns", density=0.125), 2 * WHOLE / 8 + SIGNS),
    "rows": (lambda p: Frugal(p, subspace="rows", density=0.125), 2 * WHOLE / 8 + SIGNS),
    "coordinates": (lambda p: Frugal(p, subspace="coordinates", density=0.125), 4 * 2 * WHOLE / 8),  # int64 positions
    "galore": (lambda p: GaLore(p, rank=RANK, subspace="orthogonal"), 2 * SMALL),  # R and N
    "fira": (lambda p: Fira(p, rank=RANK, subspace="orthogonal"), 2 * SMALL + 10 * 4 * 2048),  # and norms of channels
    "subtrack": (lambda p: SubTrack(p, rank=RANK), 2 * SMALL + 10 * 4 * 2048),
    "apollo": (lambda p: Apollo(p, rank=RANK), 2 * SMALL + 10 * 4 * 2048),
    "mini": (lambda p: Apollo(p, rank=1, granularity="tensor"), 10 * 4 * 2048),
    "scale": (lambda p: Scale(p), 0),
    "rmnp": (lambda p: RMNP(p), 0),
    "rmnp, nesterov": (lambda p: RMNP(p, nesterov=True), WHOLE),
    "sinkgd": (lambda p: SinkGD(p), WHOLE + 10 * 4 * (2048 + 512)),
    "swan": (lambda p: SinkGD(p, whiten=True), 4 * WHOLE),
    "adam mini": (lambda p: AdamMini(p), 10 * 8 * 2048),
    "scale, rms": (lambda p: Scale(p, length="rms"), 0),
    "scale's embedding": (lambda p: Scale([{"params": p, "split": False, "role": "input"}]), SIGNS + 4 * 512),
    "scale's head": (lambda p: Scale([{"params": p, "split": False, "role": "output"}]), 0),
    "muon": (lambda p: Muon(p), 2 * WHOLE),  # four matrices in bf16, or one beside its update in fp32
    "soap": (lambda p: SOAP(p, gap=100), 4 * WHOLE + 4 * 2048**2),  # turned, N, on the way back; and G G^T
    "conda": (lambda p: Conda(p), 2 * WHOLE),  # R and N
    "dion2": (lambda p: Dion2(p), 2 * WHOLE),
    "normuon": (lambda p: NorMuon(p), 2 * WHOLE + 10 * 4 * 2048),  # and numbers of rows
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_plain_step_holds_little(name):
    make, bound = TRANSIENT[name]
    p = torch.nn.Parameter(torch.zeros(SHAPE))
    p.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    optimizer = make([("w", p)])
    optimizer.step()
    assert peak_allocation(optimizer.step) <= bound + SPARE


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (PIECE + 1,), (3, PIECE // 2 + 1), (1, 2 * PIECE), (700, 300)])
def test_pieces_are_the_whole(shape):
    weight = torch.zeros(shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    add_sign(weight, grad, -0.5)
    assert torch.equal(weight, -0.5 * grad.sign())
    sizes = [piece.numel() for piece, _ in row_chunks(weight, grad)]
    assert sum(sizes) == weight.numel() and max(sizes) <= max(PIECE, shape[-1] if len(shape) > 1 else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_norms_are_summed_in_fp32_at_least(dim, dtype):
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, want = norms(matrix, dim), matrix.double().square()
    want = (want.sum() if dim is None else want.sum(dim, keepdim=True)).sqrt()
    assert got.shape == want.shape and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    terms = matrix.numel() / want.numel() / 8 + 8  # one after the other, in eight lanes at least
    assert torch.allclose(got.double(), want, rtol=terms * torch.finfo(got.dtype).eps, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",  # GaLore is a part of Fira's step, RMNP of SCALE's
    ["adamw", "signsgd", "muon", "normuon", "scale", "sinkgd", "adam mini", "columns", "blocks", "fira", "apollo",
     "soap", "dion2", "stable_spam", "columns, applied", "stable_spam, applied"],
)  # fmt: skip
def test_a_step_compiles(name):
    """In several graphs: torch leaves its own fused kernels out of them, and counters are read on the host."""
    torch.compiler.reset()
    weights, (name, _, told) = [], name.partition(", ")
    given = {"applied": torch.tensor(1.0)} if told else {}
    for compiled in (False, True):
        p = torch.nn.Parameter(parameters()["a"].detach())  # a wide one
        optimizer = MAKERS[name](
            [("a", p)],
            **({"gap": 100} if name in ("columns", "blocks", "fira", "apollo", "soap", "stable_spam") else {}),
        )
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for t in range(3):
            p.grad = gradient("a", t)
            (step if t else optimizer.step)(**given)
        weights.append(p.detach())
    assert torch.allclose(*weights, rtol=0, atol=1e-7)
