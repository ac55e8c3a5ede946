"""Attention weights, which fused attention does not hand out: computed again from the queries and keys of a forward."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from thriftlab.train.model import GPT, Attention


@contextmanager
def watched_attention(model: GPT) -> Iterator[list[Tensor]]:
    """A list that a forward within fills with the weights of each layer."""
    seen: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.watch = lambda q, k, mask: seen.append(attention_weights(q, k, mask))
    try:
        yield seen
    finally:
        for layer in layers:
            layer.watch = None


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Causal weights, fp32 or wider [batch, head, query, key].

    Args:
        q: [batch, head, seq, head_dim].
        k: alike, with as many heads or a divisor of their number.
        mask: True where a query may see a key; None: not later ones.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1)
