"""The rows of the cross-entropy by kernels, against sums in float64 and against the loss in plain torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.tools.triton_guard import guard
from thriftlab.kernels import linear_cross_entropy as module
from thriftlab.kernels.cross_entropy_rows import block_of, ce_grad_, ce_stats
from thriftlab.kernels.linear_cross_entropy import linear_cross_entropy

FP32, BF16 = torch.float32, torch.bfloat16
# One column; less than a block, even and odd; blocks and a rest, or none.
VOCABS = [1, 2, 37, 4096, 9000]


def rows_in(dtype, rows, vocab, pitch=None, offset=0, scale=4, seed=0):
    """Logits that begin at an offset of their storage, whose rows are `pitch` apart; targets, weights of tokens."""
    g = torch.Generator().manual_seed(seed)
    pitch = vocab if pitch is None else pitch
    storage = torch.full((offset + rows * pitch + 7,), 77.0, dtype=dtype)
    logits = storage[offset : offset + rows * pitch].view(rows, pitch)[:, :vocab]
    logits.copy_(scale * torch.randn(rows, vocab, generator=g))
    targets = torch.randint(vocab, (rows,), generator=g)
    return storage, logits, targets, torch.randn(rows, generator=g)


def reference(logits, targets, grad):
    """Loss, log-sum-exp and gradient in float64, row by row, the formulas as they are written."""
    losses, lse, grads = [], [], []
    for row, target, weight in zip(logits.double().numpy(), targets.tolist(), grad.double().tolist(), strict=True):
        total = np.log(np.exp(row - row.max()).sum()) + row.max()
        error = np.exp(row - total)
        error[target] -= 1
        losses.append(total - row[target] if target >= 0 else 0.0)
        lse.append(total)
        grads.append(weight * error if target >= 0 else 0 * row)
    shapes = ((-1,), (-1,), logits.shape)
    return (torch.from_numpy(np.array(x)).reshape(shape) for x, shape in zip((losses, lse, grads), shapes, strict=True))


def both(logits, targets, grad):
    """Loss, log-sum-exp and gradient by the kernels; every launch guarded."""
    with guard() as launches:
        loss, lse = ce_stats(logits, targets)
        found = ce_grad_(logits, targets, lse, grad)
    assert found is logits and launches == (["stats_of_row", "grad_of_row"] if len(logits) else [])
    return loss, lse, found


def check(logits, targets, grad):
    expected = reference(logits, targets, grad)
    bf16 = logits.dtype == BF16
    for found, exact in zip(both(logits, targets, grad), expected, strict=True):
        unit = 2**-7 if bf16 and found.dim() == 2 else 1e-5  # 2 ulp are 2 * 2^-8 of what they are of
        torch.testing.assert_close(found.double(), exact, rtol=unit, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("vocab", VOCABS)
def test_any_vocabulary(vocab, dtype):
    _, logits, targets, grad = rows_in(dtype, 3, vocab)
    targets[1] = vocab - 1  # the last column is somebody's target
    check(logits, targets, grad)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_any_number_of_rows(rows, dtype):
    check(*rows_in(dtype, rows, 70)[1:])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_vocabulary_of_gpt2_in_padded_rows(dtype):
    storage, logits, targets, grad = rows_in(dtype, 2, 50257, pitch=50272)
    targets[0] = 50256
    check(logits, targets, grad)
    beside = storage[:-7].view(2, 50272)[:, 50257:]
    assert (beside == 77).all() and (storage[-7:] == 77).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_that_begin_anywhere(dtype):
    storage, logits, targets, grad = rows_in(dtype, 4, 37, pitch=45, offset=3)
    check(logits, targets, grad)
    assert (storage[:3] == 77).all() and (storage[3:-7].view(4, 45)[:, 37:] == 77).all() and (storage[-7:] == 77).all()


def test_a_second_call_gives_the_same_bits():
    for dtype in (FP32, BF16):
        _, logits, targets, grad = rows_in(dtype, 3, 5000)
        again = logits.clone()
        for one, other in zip(both(logits, targets, grad), both(again, targets, grad), strict=True):
            assert torch.equal(one, other)


def test_bf16_is_fp32_rounded_once():
    _, logits, targets, grad = rows_in(BF16, 3, 5000)
    wide = both(logits.float(), targets, grad)
    loss, lse, found = both(logits, targets, grad)
    assert torch.equal(loss, wide[0]) and torch.equal(lse, wide[1]) and torch.equal(found, wide[2].bfloat16())


def test_large_logits_lose_nothing():
    """Of exponentials that would overflow, and of a token that is all but certain."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [300.0, 299.0, 3e38], [0.0, 20.0, 0.0]])
    check(logits, torch.tensor([0, 1, 1]), torch.ones(3))
    loss, _ = ce_stats(torch.tensor([[0.0, 16.0, 0.0]]), torch.tensor([1]))
    exact = np.log1p(2 * np.exp(-16.0))
    assert abs(loss.item() / exact - 1) < 0.2  # 2.3e-7 beside a logit of 16: not lost


def test_a_block_is_whole_at_least_once():
    assert [block_of(vocab) for vocab in (1, 2, 37, 4096, 50257)] == [1, 2, 32, 4096, 4096]


def test_strided_vectors():
    _, logits, targets, grad = rows_in(FP32, 4, 37)
    expected = [x.clone() for x in both(logits.clone(), targets, grad)]
    wide = torch.stack([targets, targets + 1], 1)[:, 0], torch.stack([grad, grad + 1], 1)[:, 0]
    for one, other in zip(both(logits, *wide), expected, strict=True):
        assert torch.equal(one, other)
    _, logits, targets, grad = rows_in(FP32, 4, 37)
    same = both(logits.clone(), targets, torch.ones(4))
    for one, other in zip(both(logits, targets, torch.ones(1).expand(4)), same, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------- ignored, poisoned


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1.0])
def test_every_negative_target_is_ignored_whatever_the_row_holds(dtype, bad):
    _, logits, targets, grad = rows_in(dtype, 5, 70)
    targets[1], targets[2], targets[4] = -1, -100, -(2**40)
    clean = both(logits.clone(), targets, grad)
    logits[1, 3], logits[2], logits[4, 69] = bad, bad, bad
    grad[1] = bad
    loss, _, found = both(logits, targets, grad)
    assert torch.equal(loss, clean[0]) and torch.equal(found, clean[2])
    assert not loss[targets < 0].any() and not found[targets < 0].any() and loss[0] > 0


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 20, 69])  # first; in a block; in the rest
def test_a_row_that_is_not_finite_poisons_itself_also_at_weight_zero_and_no_other(dtype, bad, place):
    _, logits, targets, grad = rows_in(dtype, 4, 70)
    clean = both(logits.clone(), targets, grad)
    logits[1, place], logits[2, place] = bad, bad
    grad[2] = 0
    loss, lse, found = both(logits, targets, grad)
    for i in (1, 2):
        assert loss[i].isnan() and lse[i].isnan() and found[i].isnan().all()
    for i in (0, 3):
        assert all(torch.equal(a[i], b[i]) for a, b in zip((loss, lse, found), clean, strict=True))


def test_a_logit_that_is_minus_infinity_has_no_share():
    """As in torch; alone it is the target that makes a loss infinite."""
    _, logits, targets, grad = rows_in(FP32, 3, 70)
    logits[:, 5], targets[:2] = -torch.inf, 6
    targets[2] = 5
    logits[0, :30] = -torch.inf
    exact = F.cross_entropy(logits, targets, reduction="none")
    loss, lse, found = both(logits, targets, grad)
    torch.testing.assert_close(loss, exact)
    assert loss[2].isposinf() and not found[:2, 5].any() and found[2, 5] == -grad[2] and found.isfinite().all()


def test_weight_zero_is_no_gradient():
    _, logits, targets, grad = rows_in(BF16, 3, 70)
    grad[1] = 0
    assert not both(logits, targets, grad)[2][1].any()


def test_every_nan_stays_one_where_it_is_rounded():
    """Of a pattern to which half a unit cannot be added."""
    _, logits, targets, _ = rows_in(BF16, 2, 70)
    grad = torch.tensor([2**31 - 1, 0], dtype=torch.int32).view(FP32)
    assert both(logits, targets, grad)[2].isnan().all(1).tolist() == [True, False]


def test_a_target_beyond_the_vocabulary_is_not_looked_up():
    _, logits, targets, grad = rows_in(FP32, 3, 70, pitch=80)
    targets[1] = 70
    assert both(logits, targets, grad)[0].isnan().tolist() == [False, True, False]


# ---------------------------------------------------------------------------------------------------- the whole loss


def whole(monkeypatch, kernels, keep_bytes, dtype, vocab=70):
    """Losses and gradients of the linear head in blocks of five rows and two, and the kernels that were launched."""
    monkeypatch.setenv("THRIFTLAB_KERNELS", kernels)
    monkeypatch.setattr(module, "blocks", lambda *_: [slice(0, 5), slice(5, 10)])
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 8, generator=g).requires_grad_()
    weight = torch.randn(vocab, 8, generator=g).requires_grad_()
    targets = torch.randint(-20, vocab, (7,), generator=g)
    upstream = torch.randn(7, generator=g)
    with torch.autocast("cpu", BF16, enabled=dtype == BF16), guard() as launches:
        losses = linear_cross_entropy(hidden, weight, targets, keep_bytes)
        grads = torch.autograd.grad(losses, (hidden, weight), upstream)
    return (losses.detach(), *grads), launches


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("vocab", [64, 70])
def test_the_loss_and_its_gradients_are_those_of_plain_torch(monkeypatch, dtype, vocab):
    kept, launches = whole(monkeypatch, "triton", None, dtype, vocab)
    assert launches == ["stats_of_row"] * 2 + ["grad_of_row"] * 2
    plain, none = whole(monkeypatch, "torch", None, dtype, vocab)
    assert none == []
    unit = 2**-7 if dtype == BF16 else 1e-5
    for i, (one, other) in enumerate(zip(kept, plain, strict=True)):
        assert one.dtype == other.dtype == FP32
        torch.testing.assert_close(one, other, rtol=1e-5 if i == 0 else unit, atol=1e-5 if i == 0 else 4 * unit)
    some = 5 * 80 * (2 if dtype == BF16 else 4)  # one block
    for keep_bytes in (0, some):
        other, _ = whole(monkeypatch, "triton", keep_bytes, dtype, vocab)
        assert all(torch.equal(a, b) for a, b in zip(other, kept, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_budget_holds_twice_the_rows_in_bf16(monkeypatch, dtype):
    monkeypatch.setenv("THRIFTLAB_KERNELS", "triton")
    hidden, weight = torch.randn(15, 4, requires_grad=True), torch.randn(1000, 4)
    targets = torch.randint(1000, (15,))
    monkeypatch.setattr(module, "blocks", lambda *_: [slice(i, i + 3) for i in range(0, 15, 3)])
    saved = {}
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) or x, lambda x: x
        ),
        torch.autocast("cpu", BF16, enabled=dtype == BF16),
    ):
        losses = linear_cross_entropy(hidden, weight, targets, 2 * 3 * 1008 * 4)
    size = 2 if dtype == BF16 else 4
    blocks = 4 if dtype == BF16 else 2
    inputs = 15 * 4 * size + weight.nbytes + targets.nbytes
    assert losses.requires_grad and sum(saved.values()) == blocks * 3 * 1008 * size + 15 * 4 + inputs


def test_rows_of_logits_begin_at_multiples_of_16_and_between_them_lie_zeros():
    """As torch's product of bf16 on a CPU reads on, and a NaN there times zero would be one."""
    block = module.block_of(torch.ones(3, 8), torch.ones(50, 8), True)
    assert block.shape == (3, 50) and block.stride() == (64, 1) and (block == 8).all()
    assert not block.as_strided((3, 64), (64, 1))[:, 50:].any()


def test_kept_blocks_serve_one_backward(monkeypatch):
    monkeypatch.setenv("THRIFTLAB_KERNELS", "triton")
    hidden, weight, targets = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4), torch.arange(9)
    for keep_bytes in (0, None):
        losses = linear_cross_entropy(hidden, weight, targets, keep_bytes).sum()
        losses.backward(retain_graph=True)
        first, hidden.grad = hidden.grad, None
        if keep_bytes == 0:
            losses.backward()
            assert torch.equal(hidden.grad, first)
        else:
            with pytest.raises(RuntimeError, match="in-?place"):
                losses.backward()


def test_a_poisoned_hidden_row_poisons_the_head_and_no_other_row(monkeypatch):
    monkeypatch.setenv("THRIFTLAB_KERNELS", "triton")
    hidden, weight, targets = torch.randn(9, 4), torch.randn(11, 4, requires_grad=True), torch.arange(9)
    upstream = torch.randn(9)
    targets[5], upstream[2] = -3, 0

    def run():
        with torch.no_grad():
            h = hidden.clone()
        h.requires_grad_()
        losses = linear_cross_entropy(h, weight, targets)
        return losses.detach(), *torch.autograd.grad(losses, (h, weight), upstream)

    clean = run()
    hidden[5] = torch.inf
    assert all(torch.equal(a, b) for a, b in zip(run(), clean, strict=True))
    hidden[2, 1] = torch.nan
    losses, grad_hidden, grad_weight = run()
    others = torch.arange(9) != 2
    assert torch.equal(losses[others], clean[0][others]) and torch.equal(grad_hidden[others], clean[1][others])
    assert losses[2].isnan() and grad_hidden[2].isnan().all() and grad_weight.isnan().any()
