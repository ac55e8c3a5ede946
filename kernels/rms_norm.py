"""RMSNorm (1910.07467): x / rms(x) * weight, over the last axis.

Torch has a fused kernel for it on GPUs only; on a CPU its formula runs operation by operation. The surprise: the fused
backward of LayerNorm serves it. Told that the mean is zero, that kernel returns our gradient less the mean of
grad * weight / rms, which is one matrix-vector product away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise [..., dim] by its root mean square.

    Args:
        x: [..., dim], any floating dtype, which the result has too.
        weight: [dim], cast to that dtype.
    """
    weight = weight.to(x.dtype)
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return RMSNormFunction.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # [..., dim], [dim]
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, grad):  # [..., dim]
        x, inverse, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight, _ = layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(inverse), inverse, weight, None, [True, True, False]
        )
        missing = (grad @ weight).unsqueeze(-1).mul_(inverse).div_(x.shape[-1])  # [..., 1]
        return grad_x.add_(missing), grad_weight, None
