"""Gradients without spikes and with even norms (Stable-SPAM, 2502.17055), by means over a tensor's own past."""

from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.lists import each

STATISTICS = ("mean_max", "mean_norm", "mean_norm_sq")  # 0-dim each


def clean(
    grads: list[Tensor], states: list[State], gammas: tuple[float | Tensor, float, float], age: Age, eps: float
) -> list[Tensor]:
    """New tensors, in the dtype of the means, which move; `age` is the steps that the means are corrected for. It and
    g1 may be tensors of one number for each gradient.

    T <- g3 T + (1 - g3) max|G|                                  entries above T^ become G T^ / max|G|
    mu <- g1 mu + (1 - g1) |G|;  w <- g2 w + (1 - g2) |G|^2;  G <- G / |G| mu^ / (sqrt(w^) + eps)
    """
    g1, g2, g3 = gammas
    tops, means, squares = ([state[key] for state in states] for key in STATISTICS)
    cleaned = [grad.to(top.dtype) for grad, top in zip(grads, tops, strict=True)]
    sizes = [grad.abs().amax() if grad.numel() else grad.new_zeros(()) for grad in cleaned]
    torch._foreach_lerp_(tops, sizes, 1 - g3)
    limits = torch._foreach_div(tops, numbers(1 - g3**age, tops))
    shares = torch._foreach_div(limits, sizes)
    for i, (grad, limit, share) in enumerate(zip(cleaned, limits, shares, strict=True)):
        cleaned[i] = torch.where(grad.abs() > limit, grad * share, grad)
    lengths = list(torch._foreach_norm(cleaned))
    move(means, lengths, g1)
    move(squares, list(torch._foreach_mul(lengths, lengths)), g2)
    even = torch._foreach_div(squares, numbers(1 - g2**age, squares))
    torch._foreach_sqrt_(even)
    torch._foreach_add_(even, eps)
    even = torch._foreach_div(torch._foreach_div(means, numbers(1 - g1**age, means)), even)
    length = torch.stack(lengths)  # [gradients]
    factors = (torch.stack(even) / length).nan_to_num(nan=0.0)  # norms that have overflowed
    for grad, factor in zip(cleaned, torch.where(length > 0, factors, 1.0).unbind(), strict=True):
        grad.mul_(factor)
    return cleaned


def move(means: list[Tensor], new: list[Tensor], decay: float | Tensor) -> None:
    """mean <- decay mean + (1 - decay) new"""
    torch._foreach_mul_(means, numbers(decay, means))
    if isinstance(decay, Tensor):
        torch._foreach_add_(means, torch._foreach_mul(new, numbers(1 - decay, means)))
    else:
        torch._foreach_add_(means, new, alpha=1 - decay)


def numbers(value: float | Tensor, like: list[Tensor]) -> list[Any]:
    """One for each, of one for all or of a tensor of them."""
    return each(value.to(like[0].dtype) if isinstance(value, Tensor) else value, len(like))
