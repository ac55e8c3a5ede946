"""RMSNorm (1910.07467): x / rms(x) * weight, over the last axis.

Torch has a fused kernel for it on GPUs only; on a CPU its formula runs operation by operation. Here the two passes are
written out, which halves their time. The surprise is in the backward: the gradient is the incoming one minus its part
along the normalised row, so no square or division comes back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, grad):  # [..., dim]
        normed, inverse, weight = ctx.saved_tensors
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed)[..., None].div_(normed.shape[-1])  # [..., 1]
        return torch.addcmul(grad, normed, along, value=-1).mul_(inverse), grad_weight, None
