"""Per-token cross-entropy of a linear head that keeps no more logits than a budget of bytes.

`losses[i] = -log_softmax(W h_i)[target_i]`. The surprise: the gradient cannot be formed in the forward pass, as fused
losses like to do, because the weight of a token may be known only after the whole batch's losses are; the head's
gradient is a sum over tokens and cannot be rescaled afterwards. Both passes walk over blocks of rows. The forward keeps
the first blocks of log-probabilities, as many as the budget holds, and the backward turns them into the gradient of the
logits in place; the others it computes a second time, by the same product of the same rows, so to the same bits.
"""

import math
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_BYTES = 2**29
CACHE_ELEMENTS = 2**18  # of logits in one block on a CPU: 1 MB in fp32
BLOCK_ELEMENTS = 2**27  # elsewhere; each block reads and writes the head's gradient once, so few are better


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int | None = KEEP_BYTES
) -> Tensor:
    """Cross-entropy in nats for every token.

    Args:
        hidden: [..., dim], any floating dtype.
        weight: [vocab, dim], the head.
        targets: [...] int64; negative entries are not predicted: their loss and gradient are zero, whatever `hidden`
            holds there, NaN included.
        keep_bytes: of log-probabilities kept for the backward; None: all. It changes time and memory and not one bit
            of the result. Nothing is kept where there will be no backward.

    Returns:
        [...] losses; fp32, or fp64 for fp64 input. Differentiable once, and the kept blocks serve one backward.

    A predicted row that is not finite poisons its own gradient and the head's, also at weight zero; no other row's.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    budget = math.inf if keep_bytes is None else keep_bytes
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        budget = 0
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), budget).view(targets.shape)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, budget):  # [tokens, dim], [vocab, dim], [tokens], bytes
        ignored, labels = targets < 0, targets.clamp(min=0)[:, None]
        hidden = hidden.masked_fill(ignored[:, None], 0)  # a weight of zero would not do: 0 * nan is nan
        head = weight.to(hidden.dtype)
        losses, kept = [], []
        for rows in blocks(hidden, weight):
            log_probs = log_probabilities(hidden[rows], head)
            losses.append(-log_probs.gather(1, labels[rows])[:, 0])
            # not nbytes, which torch.compile does not know of tensors whose sizes vary
            budget -= log_probs.numel() * log_probs.element_size()
            if budget >= 0:
                kept.append(log_probs)
        ctx.save_for_backward(hidden, weight, targets, *kept)
        return torch.cat(losses).masked_fill_(ignored, 0)

    @staticmethod
    def backward(ctx, grad):  # [tokens]
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy is differentiable once, and create_graph=True asks for twice")
        hidden, weight, targets, *kept = ctx.saved_tensors
        grad, labels = grad.masked_fill(targets < 0, 0)[:, None], targets.clamp(min=0)[:, None]
        head = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for rows, log_probs in zip_longest(blocks(hidden, weight), kept):
            if log_probs is None:
                log_probs = log_probabilities(hidden[rows], head)
            # d loss / d logits = softmax - onehot(target). In place: a second backward fails loudly.
            grad_logits = log_probs.exp_().mul_(grad[rows]).scatter_add_(1, labels[rows], -grad[rows])
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, head, out=grad_hidden[rows])
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            else:
                grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight, None, None


def log_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
    """[rows, vocab], fp32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden, head).to(wide).log_softmax(dim=-1)


def blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Row ranges whose logits fit a cache on a CPU, half a gigabyte of fp32 elsewhere."""
    tokens, vocab = len(hidden), len(weight)
    rows = max(64, (CACHE_ELEMENTS if hidden.device.type == "cpu" else BLOCK_ELEMENTS) // vocab)
    return [slice(start, start + rows) for start in range(0, max(1, tokens), rows)]
