"""Per-token cross-entropy of a linear head, with one tensor of the logits' size instead of three.

`losses[i] = -log_softmax(W h_i)[target_i]`. The surprise: the gradient cannot be formed in the forward pass, as fused
losses like to do, because the weight of a token may be known only after the whole batch's losses are; the head's
gradient is a sum over tokens and cannot be rescaled afterwards. So log-probabilities are kept, and the backward turns
them into the gradient of the logits in place. Both passes walk over blocks of rows that fit a cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE_ELEMENTS = 2**18  # of logits in one block on a CPU: 1 MB in fp32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats for every token.

    Args:
        hidden: [..., dim], any floating dtype.
        weight: [vocab, dim], the head.
        targets: [...] int64; negative entries are not predicted: their loss and gradient are zero.

    Returns:
        [...] losses; fp32, or fp64 for fp64 input. Differentiable once.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten()).view(targets.shape)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):  # [tokens, dim], [vocab, dim], [tokens]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        log_probs = hidden.new_empty(len(hidden), len(weight), dtype=wide)  # [tokens, vocab]
        for rows in blocks(log_probs):
            torch.log_softmax(F.linear(hidden[rows], weight).to(wide), dim=-1, out=log_probs[rows])
        ctx.save_for_backward(hidden, weight, targets, log_probs)
        picked = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return torch.where(targets < 0, 0.0, -picked)

    @staticmethod
    def backward(ctx, grad):  # [tokens]
        hidden, weight, targets, log_probs = ctx.saved_tensors
        grad = torch.where(targets < 0, 0.0, grad)[:, None]
        targets = targets.clamp(min=0)[:, None]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        weight = weight.to(hidden.dtype)
        for rows in blocks(log_probs):
            # d loss / d logits = softmax - onehot(target). In place: a second backward fails loudly.
            grad_logits = log_probs[rows].exp_().mul_(grad[rows]).scatter_add_(1, targets[rows], -grad[rows])
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            else:
                grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight, None


def blocks(logits: Tensor) -> list[slice]:
    """Row ranges of [tokens, vocab]: small ones on a CPU, all rows at once elsewhere."""
    tokens, vocab = logits.shape
    rows = max(64, CACHE_ELEMENTS // vocab) if logits.device.type == "cpu" else max(1, tokens)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]
