"""Gradients without spikes and with even norms (Stable-SPAM, 2502.17055), by means over a tensor's own past."""

import torch
from torch import Tensor

from thriftlab.optim.state.keys import State

STATISTICS = ("mean_max", "mean_norm", "mean_norm_sq")  # 0-dim each


def clean(
    grads: list[Tensor], states: list[State], gammas: tuple[float, float, float], age: int, eps: float
) -> list[Tensor]:
    """New tensors, in the dtype of the means, which move; `age` is the steps that the means are corrected for.

    T <- g3 T + (1 - g3) max|G|                                  entries above T^ become G T^ / max|G|
    mu <- g1 mu + (1 - g1) |G|;  w <- g2 w + (1 - g2) |G|^2;  G <- G / |G| mu^ / (sqrt(w^) + eps)
    """
    g1, g2, g3 = gammas
    tops, means, squares = ([state[key] for state in states] for key in STATISTICS)
    cleaned = [grad.to(top.dtype) for grad, top in zip(grads, tops, strict=True)]
    sizes = [grad.abs().amax() if grad.numel() else grad.new_zeros(()) for grad in cleaned]
    torch._foreach_lerp_(tops, sizes, 1 - g3)
    for i, (grad, size, top) in enumerate(zip(cleaned, sizes, tops, strict=True)):
        limit = top / (1 - g3**age)
        cleaned[i] = torch.where(grad.abs() > limit, grad * (limit / size), grad)
    lengths = torch._foreach_norm(cleaned)
    for kept, new, gamma in ((means, lengths, g1), (squares, torch._foreach_mul(lengths, lengths), g2)):
        torch._foreach_mul_(kept, gamma)
        torch._foreach_add_(kept, new, alpha=1 - gamma)
    even = torch._foreach_div(squares, 1 - g2**age)
    torch._foreach_sqrt_(even)
    torch._foreach_add_(even, eps)
    even = torch._foreach_div(torch._foreach_div(means, 1 - g1**age), even)
    for grad, length, norm in zip(cleaned, lengths, even, strict=True):
        factor = (norm / length).nan_to_num(nan=0.0)  # norms that have overflowed
        grad.mul_(torch.where(length > 0, factor, 1.0))
    return cleaned
