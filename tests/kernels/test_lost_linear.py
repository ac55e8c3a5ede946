"""The product of LOST against its two branches as they are written: numbers, gradients, memory, bytes moved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.products import concatenated, gradients, kept, tensors, traffic
from thriftlab.kernels.lost_linear import ACTS, lost_linear, reference


@given(
    lead=st.sampled_from([(), (1,), (6,), (2, 3), (0,), (2, 0, 3)]), act=st.sampled_from(sorted(ACTS)),
    rank=st.integers(1, 9), channels=st.integers(1, 12), gamma=st.sampled_from([0.0, 0.25, 0.7, 1.0]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_output_and_gradients_are_those_of_the_two_branches(lead, act, rank, channels, gamma):
    leaves, index, grad = tensors(lead, rank=rank, channels=channels)
    ours = gradients(lost_linear, leaves, index, grad, gamma, act)
    theirs = gradients(reference, leaves, index, grad, gamma, act)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ACTS)
def test_gradients_are_the_differences_of_the_output(act):
    leaves, index, _ = tensors((2, 2), rank=3, channels=2)
    assert torch.autograd.gradcheck(lambda *args: lost_linear(*args, index, 0.7, act), leaves)
    assert torch.autograd.gradcheck(lambda *args: lost_linear(*args, act=act), leaves[:3])


def test_without_channels_it_is_the_low_rank_branch():
    (x, a, b, _), _, grad = tensors()
    ours, theirs = lost_linear(x, a, b, gamma=0.6), 0.6 * torch.nn.functional.silu(x @ a.T) @ b.T
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(y, (x, a, b), grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_laid_out_as_their_tensors():
    """So that autograd keeps them as .grad without a copy."""
    leaves, index, grad = tensors()
    for leaf, found in zip(leaves, gradients(lost_linear, leaves, index, grad)[1:], strict=True):
        assert found.stride() == leaf.stride()


def test_a_second_run_gives_the_same_bits():
    leaves, index, grad = tensors((300,), inner=64, rank=16, out=48, channels=40, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(lost_linear, leaves, index, grad) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_it_compiles_as_one_graph(act):
    leaves, index, grad = tensors(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lost_linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, leaves, index, grad, act=act),
                    gradients(lost_linear, leaves, index, grad, act=act), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ half precision


def errors_of_bf16(leaves, index, grad, gamma):
    """Bounds of the errors of y, dx, dA, dB, dS to first order, from one rounding to bf16 of each tensor on the way.

    u is the largest relative error of a rounding; sums are made in fp32, whose roundings are 2^-16 of that. With
    |act'| <= 1.1, |act(h)| <= |h| and |act''| <= 0.5 for SiLU. A tensor that is a product of others has the sum of
    their relative errors of every term, and one of its own.
    """
    u = torch.finfo(torch.bfloat16).eps / 2
    x, a, b, s = (t.detach().double() for t in leaves)
    g, h = grad.double().abs(), x @ a.T
    act, slope = torch.nn.functional.silu(h), torch.sigmoid(h) * (1 + h * (1 - torch.sigmoid(h)))
    x, a, low, sparse = x.abs(), a.abs(), gamma * b.abs(), (1 - gamma) * s.abs()
    act_error = u * (1.1 * h.abs() + act.abs())  # of h, then its own
    p = g @ low  # of the folded weight, then its own; then of h in the slope, the product's own
    h_error = u * (2 * p * slope.abs() + 0.5 * p * h.abs() + p * slope.abs())
    of_h = p * slope.abs()
    y = act_error @ low.T + u * act.abs() @ low.T + u * x[:, index] @ sparse.T
    dx = h_error @ a
    dx[:, index] += 2 * u * g @ sparse
    dx_own = of_h @ a
    dx_own[:, index] += 2 * g @ sparse  # after the product, and after the sum
    da = h_error.T @ x
    db, ds = gamma * g.T @ act_error, torch.zeros_like(s)
    own = (act.abs() @ low.T + x[:, index] @ sparse.T, 2 * dx_own, of_h.T @ x,
           2 * gamma * g.T @ act.abs(), 2 * (1 - gamma) * g.T @ x[:, index])  # fmt: skip
    return [1.01 * (error + u * size) for error, size in zip((y, dx, da, db, ds), own, strict=True)]


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_close_as_its_roundings(autocast):
    leaves, index, grad = tensors((64,), inner=32, rank=16, out=24, channels=4, dtype=torch.bfloat16)
    grad = grad.bfloat16()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = gradients(reference, exact, index, grad)
    if autocast:  # of the same numbers, kept in fp32
        leaves = [t.detach().float().requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lost_linear(*leaves, index, 0.7, "silu")
    found = (y, *torch.autograd.grad(y, leaves, grad))
    assert y.dtype == torch.bfloat16 and all(f.dtype == leaf.dtype for f, leaf in zip(found[1:], leaves, strict=True))
    for one, true, bound in zip(found, truth, errors_of_bf16(leaves, index, grad, 0.7), strict=True):
        error = (one.double() - true).abs()
        assert (error <= bound).all()
        assert error.max() > bound.max() / 100, "the bound says something"


# ------------------------------------------------------------------------------------------------ memory and bytes


@pytest.mark.parametrize("autocast", [False, True])
def test_beside_its_arguments_it_keeps_h_alone(autocast):
    leaves, index, _ = tensors((64,), inner=32, rank=16, out=24, channels=4, dtype=torch.float32)
    assert kept(lost_linear, leaves, index, enabled=autocast) == 64 * 16 * (2 if autocast else 4)
    if not autocast:
        assert kept(reference, leaves, index, enabled=False) == 64 * (16 + 16 + 4) * 4, "h, act(h), x_I"


@pytest.mark.parametrize("inner, out, channels", [(512, 1376, 5), (512, 512, 5), (1376, 512, 13)])
def test_fewer_bytes_are_moved(inner, out, channels):
    """Forward and backward of LLaMA-60M's three shapes."""
    args = tensors((2048,), inner, 128, out, channels, dtype=torch.float32)
    ours, eager, beside = (traffic(function, *args) for function in (lost_linear, reference, concatenated))
    print(f"{inner}->{out}: {ours / 1e6:.1f} MB; as two branches {eager / 1e6:.1f}, side by side {beside / 1e6:.1f}")
    assert 2 * ours < eager and ours < beside
