"""Cross-entropy of rows of logits, in one pass each way.

    loss_i = lse_i - x_i[target_i],        lse_i = log sum_j exp x_ij
    d x_ij = (exp(x_ij - lse_i) - [j = target_i]) grad_i

The surprise: the log-sum-exp reads its row once, though its largest entry is known at the end only. The sum so far is
kept as a sum of exp(x - largest so far), and is rescaled whenever a larger entry comes (1805.02867). Of the two
exponentials of such a step, exp(x - largest) and the factor exp(old - new), one is always exp(0), so one is computed.

The gradient needs of all that was known in the forward pass only `lse`, one fp32 a row. It takes the place of the
logits, which nobody needs after it: a bf16 logit is written by the product, and then read, read and written.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from thriftlab.kernels.floats import narrowed, stored, widened
from thriftlab.kernels.variant import Variant

LARGEST_BLOCK = 4096  # columns that a program has at a time


def ce_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row, in fp32.

    Args:
        logits: [rows, vocab] fp32 or bf16; entries of a row lie side by side, rows anywhere.
        targets: [rows] int64; negative: ignored, the loss is 0 whatever the row holds. Beyond the vocabulary: NaN.
    """
    loss, lse = torch.ops.thriftlab.ce_stats(logits, targets)
    return loss, lse


def ce_grad_(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the logits, in their place.

    A row that is not finite poisons its gradient also where `grad`, [rows] fp32, is 0. A row that is ignored does not,
    whatever is in it and in its `grad`: there it is 0.
    """
    torch.ops.thriftlab.ce_grad_(logits, targets, lse, grad)
    return logits


# ---------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def add_logits(x, largest, total):
    """One logit more for every lane: the sum of the exponentials of a lane's logits is total * exp(largest)."""
    step = tl.where(x == largest, 0.0, x - largest)  # -inf - -inf is no step
    smaller = tl.exp(-tl.abs(step))
    total = tl.where(step > 0, total * smaller + 1.0, total + smaller)
    return tl.maximum(largest, x), total


@triton.jit
def stats_of_row(logits, targets, losses, lses, stride, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * stride
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    whole = vocab // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        largest, total = add_logits(widened(tl.load(x + first + lane)), largest, total)
    inside = whole + lane < vocab
    last = widened(tl.load(x + whole + lane, mask=inside, other=0))
    largest, total = add_logits(tl.where(inside, last, float("-inf")), largest, total)

    top = tl.max(largest, axis=0)  # it overlooks NaN, the sum does not
    log_total = tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocab)
    at_target = tl.where(known, widened(tl.load(x + target, mask=known, other=0)), float("nan"))
    tl.store(losses + row, tl.where(target < 0, 0.0, (top - at_target) + log_total))
    tl.store(lses + row, top + log_total)


@triton.jit
def gradient(x, column, target, lse, grad):
    """Of logits. Nothing is left out where `grad` is 0, for 0 * nan must be nan."""
    error = tl.exp(x - lse) - tl.where(column == target, 1.0, 0.0)
    return tl.where(target < 0, 0.0, error * grad)


@triton.jit
def grad_of_row(logits, targets, lses, grads, stride, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * stride
    lane = tl.arange(0, BLOCK)
    target, lse, grad = tl.load(targets + row), tl.load(lses + row), tl.load(grads + row)
    kind: tl.constexpr = logits.dtype.element_ty
    whole = vocab // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        found = gradient(widened(tl.load(x + first + lane)), first + lane, target, lse, grad)
        tl.store(x + first + lane, narrowed(found, kind))
    column = whole + lane
    inside = column < vocab
    found = gradient(widened(tl.load(x + column, mask=inside, other=0)), column, target, lse, grad)
    tl.store(x + column, narrowed(found, kind), mask=inside)


# ---------------------------------------------------------------------------------------------------- launches


def block_of(vocab: int) -> int:
    """The largest power of two in `vocab`, so that most columns need no mask, up to what registers hold."""
    return min(LARGEST_BLOCK, 1 << (vocab.bit_length() - 1))


def warps_of(block: int) -> int:
    """16 entries a thread: two loads of 128 bits in bf16."""
    return max(1, block // (16 * 32))


@torch.library.custom_op("thriftlab::ce_stats", mutates_args=())
def launch_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    loss, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        block = block_of(vocab)
        stats_of_row[(rows,)](
            stored(logits),
            targets.contiguous(),
            loss,
            lse,
            logits.stride(0),
            vocab,
            BLOCK=block,
            num_warps=warps_of(block),
        )
    return loss, lse


@launch_stats.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("thriftlab::ce_grad_", mutates_args=("logits",))
def launch_grad_(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> None:
    rows, vocab = logits.shape
    if rows:
        block = block_of(vocab)
        grad_of_row[(rows,)](
            stored(logits),
            targets.contiguous(),
            lse.contiguous(),
            grad.contiguous(),
            logits.stride(0),
            vocab,
            BLOCK=block,
            num_warps=warps_of(block),
        )


@launch_grad_.register_fake
def _(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> None:
    return None


# ---------------------------------------------------------------------------------------------------- the slow truth


def ce_stats_torch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    lse = wide.logsumexp(dim=1)
    at_target = wide.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return (lse - at_target).masked_fill(targets < 0, 0), lse


def ce_grad_torch_(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    error = (logits.float() - lse[:, None]).exp()
    error.scatter_add_(1, targets.clamp(min=0)[:, None], error.new_full((len(error), 1), -1))
    return logits.copy_((error * grad[:, None]).masked_fill(targets[:, None] < 0, 0))


# ---------------------------------------------------------------------------------------------------- the gate


def variants() -> Iterator[Variant]:
    """For gate.py: a vocabulary of 50304 columns, and one of 50257, whose last block is read entry by entry."""
    row = {"targets": "*i64", "stride": "i32", "vocab": "i32", "BLOCK": LARGEST_BLOCK}
    warps = warps_of(LARGEST_BLOCK)
    for dtype, pointer in {"bf16": "*i16", "fp32": "*fp32"}.items():
        for even in (True, False):
            words = f"{dtype}, {'even' if even else 'odd'} vocabulary"
            multiples = ("stride", "vocab") if even else ("stride",)
            stats = {**row, "logits": pointer, "losses": "*fp32", "lses": "*fp32"}
            grad = {**row, "logits": pointer, "lses": "*fp32", "grads": "*fp32"}
            yield Variant(f"stats, {words}", stats_of_row, stats, warps, multiples=multiples, narrow=dtype == "bf16")
            narrow = dtype == "bf16" and not even
            yield Variant(f"grad, {words}", grad_of_row, grad, warps, multiples=multiples, narrow=narrow)
