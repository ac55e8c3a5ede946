"""Per-token cross-entropy of a linear head, without a second logit-sized tensor in the forward.

`losses[i] = logsumexp(W h_i) - (W h_i)[target_i]`. The surprise: the gradient cannot be formed in the forward pass, as
fused losses like to do, because the weight of a token may be known only after the whole batch's losses are; the head's
gradient is a sum over tokens and cannot be rescaled afterwards. So logits and logsumexp are kept, and the softmax is
formed once, in the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats for every token.

    Args:
        hidden: [..., dim], any floating dtype.
        weight: [vocab, dim], the head.
        targets: [...] int64; negative entries are not predicted: their loss and gradient are zero.

    Returns:
        [...] losses; fp32, or fp64 for fp64 input.
    """
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten()).view(targets.shape)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):  # [tokens, dim], [vocab, dim], [tokens]
        logits = F.linear(hidden, weight)  # [tokens, vocab]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        lse = wide.logsumexp(-1)  # [tokens]
        picked = wide.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        ctx.save_for_backward(hidden, weight, targets, logits, lse)
        return torch.where(targets < 0, 0.0, lse - picked)

    @staticmethod
    def backward(ctx, grad):  # [tokens]
        hidden, weight, targets, logits, lse = ctx.saved_tensors
        grad = torch.where(targets < 0, 0.0, grad)
        softmax = torch.sub(logits, lse[:, None]).exp_()  # [tokens, vocab]
        softmax.mul_(grad[:, None])
        softmax.scatter_add_(1, targets.clamp(min=0)[:, None], -grad[:, None])
        grad_logits = softmax.to(logits.dtype)
        grad_hidden = (grad_logits @ weight.to(logits.dtype)).to(hidden.dtype)
        grad_weight = (grad_logits.T @ hidden.to(logits.dtype)).to(weight.dtype)
        return grad_hidden, grad_weight, None
