"""Per-token cross-entropy of a linear head that keeps no more logits than a budget of bytes.

`losses[i] = -log_softmax(W h_i)[target_i]`. The surprise: the gradient cannot be formed in the forward pass, as fused
losses like to do, because the weight of a token may be known only after the whole batch's losses are; the head's
gradient is a sum over tokens and cannot be rescaled afterwards. Both passes walk over blocks of rows. The forward keeps
the first blocks, as many as the budget holds, and the backward turns them into the gradient of the logits in place; the
others it computes a second time, by the same product of the same rows, so to the same bits.

What a block holds: in plain torch log-probabilities, in fp32; with the kernels of cross_entropy_rows.py logits, in bf16
under autocast, beside one fp32 a row.
"""

import math
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from thriftlab.kernels.dispatch import path

KEEP_BYTES = 2**29
CACHE_ELEMENTS = 2**18  # of logits in one block on a CPU: 1 MB in fp32
BLOCK_ELEMENTS = 2**27  # elsewhere; each block reads and writes the head's gradient once, so few are better
ALIGN = 16  # columns: rows of logits that begin at multiples of 32 bytes are read 128 bits at a time


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int | None = KEEP_BYTES
) -> Tensor:
    """Cross-entropy in nats for every token.

    Args:
        hidden: [..., dim], any floating dtype.
        weight: [vocab, dim], the head.
        targets: [...] int64; negative entries are not predicted: their loss and gradient are zero, whatever `hidden`
            holds there, NaN included.
        keep_bytes: of blocks kept for the backward; None: all. It changes time and memory and not one bit of the
            result. Nothing is kept where there will be no backward.

    Returns:
        [...] losses; fp32, or fp64 for fp64 input. Differentiable once, and the kept blocks serve one backward.

    A predicted row that is not finite poisons its own gradient and the head's, also at weight zero; no other row's.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if path(hidden, "cross_entropy_rows") == "liger":
        from thriftlab.kernels.liger_loss import liger_cross_entropy

        return liger_cross_entropy(hidden.flatten(0, -2), weight, targets.flatten()).view(targets.shape)
    budget = math.inf if keep_bytes is None else keep_bytes
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        budget = 0
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), budget).view(targets.shape)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, budget):  # [tokens, dim], [vocab, dim], [tokens], bytes
        ctx.by_kernel = path(hidden, "cross_entropy_rows") == "triton"
        ignored = targets < 0
        hidden = hidden.masked_fill(ignored[:, None], 0)  # a weight of zero would not do: 0 * nan is nan
        head = weight.to(hidden.dtype)
        losses, lse, kept = [], [], []
        for rows in blocks(hidden, weight):
            block = block_of(hidden[rows], head, ctx.by_kernel)
            loss, lse_of_rows = losses_of(block, targets[rows], ctx.by_kernel)
            losses.append(loss)
            lse.append(lse_of_rows)
            # not nbytes, which torch.compile does not know of tensors whose sizes vary
            budget -= len(block) * block.stride(0) * block.element_size()
            if budget >= 0:
                kept.append(block)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(lse) if ctx.by_kernel else None, *kept)
        return torch.cat(losses).masked_fill_(ignored, 0)

    @staticmethod
    def backward(ctx, grad):  # [tokens]
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy is differentiable once, and create_graph=True asks for twice")
        hidden, weight, targets, lse, *kept = ctx.saved_tensors
        grad = grad.masked_fill(targets < 0, 0)
        head = weight.to(hidden.dtype)
        # The sum over blocks is made in the dtype of the losses, fp32 or wider, whatever the weight's.
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=grad.dtype)
        for rows, block in zip_longest(blocks(hidden, weight), kept):
            if block is None:
                block = block_of(hidden[rows], head, ctx.by_kernel)
            # In place: a second backward fails loudly.
            grad_logits = grad_of_(block, targets[rows], None if lse is None else lse[rows], grad[rows])
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, head, out=grad_hidden[rows])
            add_product(grad_weight, grad_logits, hidden[rows])
        return grad_hidden, grad_weight, None, None


def block_of(hidden: Tensor, head: Tensor, by_kernel: bool) -> Tensor:
    """[rows, vocab]: logits for the kernels; else log-probabilities, fp32 or wider."""
    if by_kernel:
        vocab = len(head)
        padded = hidden.new_empty(len(hidden), vocab + -vocab % ALIGN)
        padded[:, vocab:] = 0  # a CPU's product of bf16 reads it (oneDNN)
        return torch.mm(hidden, head.T, out=padded[:, :vocab])
    logits = F.linear(hidden, head).to(torch.promote_types(hidden.dtype, torch.float32))
    # On a CPU in place: the pages of a fresh block cost more than the logarithms.
    return torch.log_softmax(logits, dim=-1, out=logits if logits.is_cpu else None)


def losses_of(block: Tensor, targets: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor | None]:
    """[rows] losses, and the log-sum-exp of logits."""
    if by_kernel:
        from thriftlab.kernels.cross_entropy_rows import ce_stats

        return ce_stats(block, targets)
    return -block.gather(1, targets.clamp(min=0)[:, None])[:, 0], None


def grad_of_(block: Tensor, targets: Tensor, lse: Tensor | None, grad: Tensor) -> Tensor:
    """d loss / d logits = grad (softmax - onehot(target)), in place of the block."""
    if lse is not None:
        from thriftlab.kernels.cross_entropy_rows import ce_grad_

        return ce_grad_(block, targets, lse, grad)
    labels, grad = targets.clamp(min=0)[:, None], grad[:, None]
    return block.exp_().mul_(grad).scatter_add_(1, labels, -grad)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, [vocab, dim]."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    elif not total.is_cuda:
        total += left.T @ right
    elif torch.compiler.is_compiling():  # Inductor has no addmm of two dtypes (pytorch issue 163880)
        total += torch.mm(left.T, right, out_dtype=total.dtype)
    else:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)


def blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Row ranges whose logits fit a cache on a CPU, half a gigabyte of fp32 elsewhere."""
    tokens, vocab = len(hidden), len(weight)
    rows = max(64, (CACHE_ELEMENTS if hidden.device.type == "cpu" else BLOCK_ELEMENTS) // vocab)
    return [slice(start, start + rows) for start in range(0, max(1, tokens), rows)]
