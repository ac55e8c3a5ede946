"""The embedding of a bf16 table: fp32 rows, and gradients that are sums in fp32."""

import pytest
import torch
import torch.nn.functional as F

from thriftlab.kernels.embedding import embedding


def table(dtype, grad_dtype=None):
    weight = torch.nn.Parameter(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    if grad_dtype:
        weight.grad_dtype = grad_dtype
    return weight


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_a_token_that_occurs_a_thousand_times(grad_dtype):
    weight = table(torch.bfloat16, grad_dtype)
    rows = embedding(torch.zeros(4, 250, dtype=torch.int64), weight)
    assert rows.dtype == torch.float32 and torch.equal(rows[0, 0], weight[0].float())
    rows.sum().backward()
    assert weight.grad.dtype == grad_dtype and torch.equal(weight.grad[0].float(), torch.full((3,), 1000.0))
    assert not weight.grad[1:].any()


def test_the_gradient_is_that_of_an_fp32_table_rounded_once():
    tokens = torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(50, 3, generator=torch.Generator().manual_seed(2))
    ours, wide, exact = (
        table(torch.bfloat16),
        table(torch.bfloat16, torch.float32),
        table(torch.bfloat16).detach().float(),
    )
    exact.requires_grad_()
    embedding(tokens, ours).backward(upstream)
    for _ in range(2):  # micro-batches are summed in fp32
        embedding(tokens, wide).backward(upstream)
    F.embedding(tokens, exact).backward(upstream)
    assert torch.equal(ours.grad, exact.grad.bfloat16()) and torch.equal(wide.grad, 2 * exact.grad)


def test_an_fp32_table_is_torchs_own():
    tokens, weight = torch.tensor([[1, 1, 5]]), table(torch.float32)
    assert torch.equal(embedding(tokens, weight), F.embedding(tokens, weight))
    assert type(embedding(tokens, weight).grad_fn) is type(F.embedding(tokens, weight).grad_fn)
