"""LOST's branches by kernels: against the formulas in numpy's float64, and against the layer in plain torch."""

import numpy as np
import pytest
import torch
from scipy.special import erf

from tests.tools.products import gradients, tensors
from tests.tools.triton_guard import guard
from thriftlab.kernels.branches import add_channels_, fold, join_branches, part_branches_
from thriftlab.kernels.lost_linear import lost_linear

FP32, BF16 = torch.float32, torch.bfloat16
SIGMA = {"silu": lambda h: 1 / (1 + np.exp(-h)), "gelu": lambda h: (1 + erf(h / np.sqrt(2))) / 2}
ACTS = {
    "silu": lambda h: h * SIGMA["silu"](h),
    "gelu": lambda h: h * SIGMA["gelu"](h),
    "relu2": lambda h: np.maximum(h, 0) ** 2,
    "none": lambda h: h,
}
SLOPES = {
    "silu": lambda h: SIGMA["silu"](h) + h * SIGMA["silu"](h) * SIGMA["silu"](-h),
    "gelu": lambda h: SIGMA["gelu"](h) + h * np.exp(-(h**2) / 2) / np.sqrt(2 * np.pi),
    "relu2": lambda h: 2 * np.maximum(h, 0),
    "none": lambda h: np.ones_like(h),
}
# tokens, rank, channels, in: one of each; tiles that are not full; none; wider than a tile; many rows of a tile
SHAPES = [(1, 1, 1, 1), (5, 7, 3, 11), (0, 4, 2, 6), (2, 1030, 5, 9), (70, 16, 8, 24), (3, 16, 0, 5)]


def drawn(shape, dtype, seed, offset=0):
    """Numbers in rows that lie further apart than they are long, and begin at an offset."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape
    storage = torch.full((offset + rows * (columns + 3),), 77.0, dtype=dtype)
    matrix = storage[offset:].view(rows, columns + 3)[:, :columns]
    return matrix.copy_(2 * torch.randn(rows, columns, generator=g))


def chosen(inner, channels, seed=0):
    return torch.randperm(inner, generator=torch.Generator().manual_seed(seed))[:channels]


def close(found, exact, dtype):
    """fp32 1e-5; bf16 one ulp, for it is rounded once."""
    exact = torch.from_numpy(np.asarray(exact)).reshape(found.shape)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5 if dtype == FP32 else 2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype, of_x", [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_branches_lie_side_by_side(shape, dtype, of_x):
    tokens, rank, channels, inner = shape
    x, h, index = drawn((tokens, inner), of_x, 1, 5), drawn((tokens, rank), dtype, 2, 1), chosen(inner, channels)
    with guard():
        joined = join_branches(x, h, index, "silu")
    width = rank + channels + -(rank + channels) % 8
    assert joined.shape == (tokens, width) and joined.dtype == dtype and joined.is_contiguous()
    close(joined[:, :rank], ACTS["silu"](h.double().numpy()), dtype)
    assert torch.equal(joined[:, rank : rank + channels], x[:, index].to(dtype))
    assert not joined[:, rank + channels :].any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("act", ACTS)
def test_every_activation_and_its_slope(act, dtype):
    h, x, grad = drawn((4, 33), dtype, 1), drawn((4, 5), dtype, 2), drawn((4, 36), dtype, 3, 2)
    h[0, :4] = torch.tensor([0.0, -0.0, 30.0, -30.0])
    before = grad.clone()
    with guard() as launches:
        joined, found = join_branches(x, h, chosen(5, 3), act), part_branches_(grad, h, act)
    assert launches == ["join", "part"] and found.data_ptr() == grad.data_ptr() and found.shape == (4, 33)
    close(joined[:, :33], ACTS[act](h.double().numpy()), dtype)
    close(found, SLOPES[act](h.double().numpy()) * before[:, :33].double().numpy(), dtype)
    assert torch.equal(grad[:, 33:], before[:, 33:])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_h_takes_the_place_of_that_of_its_activation(shape, dtype):
    tokens, rank, channels, _ = shape
    h, grad = drawn((tokens, rank), dtype, 1, 3), drawn((tokens, rank + channels), dtype, 2, 1)
    before = grad.clone()
    with guard():
        found = part_branches_(grad, h, "gelu")
    close(found, SLOPES["gelu"](h.double().numpy()) * before[:, :rank].double().numpy(), dtype)
    assert torch.equal(grad[:, rank:], before[:, rank:])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape, gamma", [*((shape, 0.7) for shape in SHAPES), (SHAPES[1], 0.0), (SHAPES[1], 1.0)])
def test_weights_are_folded_to_the_bit(shape, gamma, dtype):
    out, rank, channels, _ = shape
    low, sparse = drawn((out, rank), FP32, 1, 5), drawn((out, channels), FP32, 2, 1)
    with guard():
        folded = fold(low, sparse, gamma, dtype)
    assert torch.equal(folded[:, :rank], (gamma * low).to(dtype))
    assert torch.equal(folded[:, rank : rank + channels], ((1 - gamma) * sparse).to(dtype))
    assert not folded[:, rank + channels :].any() and folded.shape[1] % 8 == 0


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_channels_are_added_to_the_bit_and_no_others(shape, dtype):
    tokens, _, channels, inner = shape
    grad_x, grad, index = (
        drawn((tokens, inner), dtype, 1, 3),
        drawn((tokens, channels), dtype, 2),
        chosen(inner, channels),
    )
    expected = grad_x.clone()
    expected[:, index] += grad
    with guard():
        assert add_channels_(grad_x, grad, index) is grad_x
    assert torch.equal(grad_x, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_finite_stays_where_it_is(act, bad):
    h, x, grad = drawn((3, 5), FP32, 1), drawn((3, 6), FP32, 2), drawn((3, 8), FP32, 3)
    index = torch.tensor([4, 1])
    clean = join_branches(x, h, index, act), part_branches_(grad.clone(), h, act).clone()
    h[1, 2], x[2, 4] = bad, bad
    joined, found = join_branches(x, h, index, act), part_branches_(grad.clone(), h, act)
    touched = torch.zeros(3, 8, dtype=torch.bool)
    touched[1, 2] = touched[2, 5] = True
    assert torch.equal(joined[~touched], clean[0][~touched])
    torch.testing.assert_close(joined[2, 5], torch.tensor(bad), equal_nan=True)
    if bad != -torch.inf:
        assert not joined[1, 2].isfinite()
    assert torch.equal(found[[0, 2]], clean[1][[0, 2]]) and (bad == bad or act == "none" or found[1, 2].isnan())
    grad[1, 3] = bad
    assert not part_branches_(grad.clone(), clean[0][:, :5], act)[1, 3].isfinite()
    assert not add_channels_(x.clone(), grad[:, 2:4], index)[1, 1].isfinite()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("act", ["silu", "relu2"])
@pytest.mark.parametrize("lead", [(6,), (2, 3), (0,)])
def test_the_layer_and_its_gradients_are_those_of_plain_torch(monkeypatch, lead, act, autocast):
    leaves, index, grad = tensors(lead, rank=20, channels=5, dtype=FP32)
    found = {}
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("THRIFTLAB_KERNELS", kernels)
        with torch.autocast("cpu", BF16, enabled=autocast), guard() as launches:
            found[kernels] = gradients(lost_linear, leaves, index, grad, act=act)
        if lead[0]:
            assert launches == (["join", "join", "join", "part", "join", "add_columns"] if kernels == "triton" else [])
    for one, other in zip(found["triton"], found["torch"], strict=True):
        assert one.dtype == other.dtype
        unit = 2**-7 if autocast else 1e-5
        torch.testing.assert_close(
            one, other, rtol=unit, atol=unit * (1 + other.abs().max().item()) if one.numel() else 0
        )


def test_a_second_run_gives_the_same_bits(monkeypatch):
    monkeypatch.setenv("THRIFTLAB_KERNELS", "triton")
    leaves, index, grad = tensors((6,), rank=20, channels=5, dtype=FP32)
    first, second = (gradients(lost_linear, leaves, index, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_columns_that_do_not_lie_side_by_side_and_a_layer_without_channels_take_torch(monkeypatch):
    monkeypatch.setenv("THRIFTLAB_KERNELS", "triton")
    (x, a, b, s), index, _ = tensors((6,), dtype=FP32)
    with guard() as launches:
        lost_linear(x.detach().T.contiguous().T, a, b, s, index)
        lost_linear(x, a, b)
    assert launches == []
