"""Rows of a table in fp32, whatever the table is kept in, and a gradient that is a sum in fp32.

The surprise: torch adds the gradients of a bf16 table in bf16, so that a token that occurs a thousand times in a batch
has the gradient of the first 256. Here the sum is fp32, and autograd rounds it once, to `weight.grad_dtype`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

embedding_backward = torch.ops.aten.embedding_dense_backward.default


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table.

    Args:
        tokens: [...] int64.
        weight: [vocab, dim]; bf16, or fp32 and wider, which are torch's own embedding.

    Returns:
        [..., dim]; fp32 of a bf16 table.
    """
    return EmbeddingFunction.apply(tokens, weight) if weight.dtype == torch.bfloat16 else F.embedding(tokens, weight)


class EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight):  # [...], [vocab, dim]
        ctx.save_for_backward(tokens)
        ctx.vocab = len(weight)
        return F.embedding(tokens, weight).float()

    @staticmethod
    def backward(ctx, grad):  # [..., dim]
        (tokens,) = ctx.saved_tensors
        return None, embedding_backward(grad, tokens, ctx.vocab, -1, False)
