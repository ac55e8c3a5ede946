"""Norms of gradients, in fp32 whatever they are kept in: torch's own of bf16 tensors answer in bf16, 100 for 99.8."""

import torch
from torch import Tensor


def norms_of(grads: list[Tensor]) -> list[Tensor]:
    """Of each tensor, 0-dim, fp32 or wider."""
    narrow = any(grad.itemsize < 4 for grad in grads)
    return list(torch._foreach_norm(grads, 2, torch.float32 if narrow else None)) if grads else []


def total_norm(grads: list[Tensor]) -> Tensor:
    """Of all tensors together."""
    return torch.linalg.vector_norm(torch.stack(norms_of(grads))) if grads else torch.tensor(0.0)
