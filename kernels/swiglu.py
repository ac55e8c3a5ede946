"""SwiGLU (2002.05202): silu(gate) * up.

Left to autograd, three tensors of the hidden width are kept for the backward. The surprise: one of them, silu(gate),
costs less to compute again than to write to memory and read back, so two are kept, and products are formed in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for two tensors of one shape and dtype."""
    return SwiGLU.apply(gate, up)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_silu = grad * up
        return torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_silu), grad_up
